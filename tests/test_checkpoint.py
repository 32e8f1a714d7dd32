"""A checkpoint is whole, or it is not there: killed, damaged, unwritable, and the ones that stay."""

import contextlib
import math
import os
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import full_disk

from easyrm.errors import InputError, SaveFailed, Unavailable
from easyrm.training.checkpoint import Checkpoints
from easyrm.training.progress import Progress
from easyrm.training.retention import LEASE_SECONDS, Retention, readers_of
from easyrm.training.saved_step import _Damaged, restore_model
from easyrm.training.step import TrainState


def state_of(seed):
    rng = np.random.default_rng(seed)
    # `w` is large enough to lie in a file of its own, `b` lies in the index.
    model = {
        "w": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    moments = (jnp.int32(seed), {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.bfloat16)})
    return TrainState(model, moments, jnp.bool_(True))


def abstract_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def opened(folder, said=None, strict=False, **retention):
    retention = {"newest": 10, **retention}
    say = (lambda line: None) if said is None else said.append
    return Checkpoints(folder / "checkpoints", Retention(**retention), strict=strict, say=say)


def saved(folder, steps, metrics=None, **options):
    with opened(folder, **options) as checkpoints:
        for step in steps:
            figures = (metrics or {}).get(step, {})
            checkpoints.save(state_of(step), Progress(step, 10 * step, metrics=figures), {"some": "record"})


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_what_is_saved_comes_back(tmp_path):
    saved(tmp_path, [3, 4])
    with opened(tmp_path) as checkpoints:
        assert checkpoints.newest() == Progress(4, 40)
        state, progress = checkpoints.restore(abstract_of(state_of(0)))
    assert progress == Progress(4, 40) and same(state, state_of(4))
    model, step = restore_model(tmp_path / "checkpoints", 3, abstract_of(state_of(0)).model)
    assert step == 3 and same(model, state_of(3).model)


def flipped(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


DAMAGES = {
    "removed": lambda data, rng: None,
    "empty": lambda data, rng: b"",
    "first half": lambda data, rng: data[: len(data) // 2],
    "one byte short": lambda data, rng: data[:-1],
    "a bit in the first 16 bytes": lambda data, rng: flipped(data[:16], rng) + data[16:],
    "a bit somewhere": flipped,
    "a bit somewhere else": flipped,
    "a bit in the last 16 bytes": lambda data, rng: data[:-16] + flipped(data[-16:], rng),
    "zeros in the middle": lambda data, rng: (
        data[: len(data) // 3] + bytes(len(data) // 3) + data[len(data) * 2 // 3 :]
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what a failed read leaves behind
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_named_and_the_one_before_is_taken(tmp_path, damage):
    """Each file of the newest step in turn; no damage gives another state, or an error that is not ours."""
    saved(tmp_path / "whole", [1, 2])
    files = [path for path in (tmp_path / "whole/checkpoints/2").rglob("*") if path.is_file()]
    assert len(files) > 8
    rng, fell_back = random.Random(damage), 0
    for file in files:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        target, said = folder / file.relative_to(tmp_path / "whole"), []
        data = DAMAGES[damage](target.read_bytes(), rng)
        target.unlink() if data is None else target.write_bytes(data)
        with contextlib.suppress(InputError):
            model, step = restore_model(folder / "checkpoints", None, abstract_of(state_of(0)).model)
            assert step == 2 and same(model, state_of(2).model), target
        with opened(folder, said) as checkpoints:
            state, progress = checkpoints.restore(abstract_of(state_of(0)))
            assert progress == Progress(progress.step, 10 * progress.step), target
            assert same(state, state_of(progress.step)), target
            if progress.step == 1:
                fell_back += 1
                assert any("step 2 is damaged" in line and "damaged/2" in line for line in said), target
                assert (folder / "damaged/2").is_dir() and steps_in(folder) == [1]
            checkpoints.save(state_of(2), Progress(2, 20), {})  # its name is free again
        assert steps_in(folder) == [1, 2]
        shutil.rmtree(folder)
    assert fell_back >= 3


def test_a_bucket_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, [1, 2])
    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", lambda *_, **__: (_ for _ in ()).throw(TimeoutError()))
        with pytest.raises(TimeoutError):
            checkpoints.restore(abstract_of(state_of(0)))
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("HTTP 503"), MemoryError()])
def test_what_is_not_known_as_damage_moves_nothing(tmp_path, monkeypatch, error):
    saved(tmp_path, [1, 2])
    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            checkpoints.restore(abstract_of(state_of(0)))
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_no_step_is_whole_nothing_begins_anew(tmp_path):
    saved(tmp_path, [1])
    for file in (tmp_path / "checkpoints/1/model").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    with opened(tmp_path) as checkpoints, pytest.raises(InputError, match="no checkpoint is whole"):
        checkpoints.restore(abstract_of(state_of(0)))
    with pytest.raises(InputError, match="no checkpoint is whole"):
        opened(tmp_path)


def test_a_save_fails_while_the_bucket_cannot_be_listed(tmp_path, monkeypatch):
    said = []
    with opened(tmp_path, said) as checkpoints:
        checkpoints.save(state_of(1), Progress(1, 10), {})
        checkpoints.settle()
        with full_disk(300), monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "reload", lambda: (_ for _ in ()).throw(OSError("bucket away")))
            checkpoints.save(state_of(2), Progress(2, 20), {})
            checkpoints.settle()
        checkpoints.save(state_of(3), Progress(3, 30), {})
    assert len(said) == 1 and {1, 3} <= set(steps_in(tmp_path))


def test_a_pending_evaluation_is_noted_in_the_step(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state_of(1), Progress(1, 10, pending_eval=True), {})
        checkpoints.settle()
        checkpoints.evaluated(Progress(1, 10, metrics={"eval/accuracy": 0.75}))
    with opened(tmp_path) as checkpoints:
        _, progress = checkpoints.restore(abstract_of(state_of(0)))
    assert progress == Progress(1, 10, metrics={"eval/accuracy": 0.75})


def test_another_model_is_refused_and_left_alone(tmp_path):
    saved(tmp_path, [1])
    other = state_of(0)
    other = other._replace(model={**other.model, "w": jnp.zeros((6, 9))})
    with opened(tmp_path) as checkpoints, pytest.raises(InputError, match=r"1 arrays differ, model/w is .*\[40, 50\]"):
        checkpoints.restore(abstract_of(other))
    assert steps_in(tmp_path) == [1]


def test_what_a_killed_save_leaves_is_no_step_and_goes(tmp_path):
    saved(tmp_path, [1])
    half = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/1", half)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.newest() == Progress(1, 10)
        checkpoints.save(state_of(2), Progress(2, 20), {})
    assert not half.exists() and steps_in(tmp_path) == [1, 2]


def test_a_save_that_fails_is_said_and_the_next_one_counts(tmp_path):
    said = []
    with opened(tmp_path, said, newest=1) as checkpoints:
        checkpoints.save(state_of(1), Progress(1, 10), {})
        checkpoints.settle()
        with full_disk(300):
            checkpoints.save(state_of(2), Progress(2, 20), {})
            checkpoints.settle()
        assert checkpoints.newest() == Progress(1, 10)
        assert len(said) == 1 and "step 2 was not written" in said[0] and "complete one is step 1" in said[0]
        assert steps_in(tmp_path) == [1] and len(list((tmp_path / "checkpoints").glob("2*"))) == 0
        checkpoints.save(state_of(3), Progress(3, 30), {})
    assert steps_in(tmp_path) == [3] and len(said) == 1
    with opened(tmp_path) as checkpoints:
        state, progress = checkpoints.restore(abstract_of(state_of(0)))
    assert progress.step == 3 and same(state, state_of(3))


def test_a_save_that_failed_is_told_before_the_next(tmp_path):
    said = []
    with opened(tmp_path, said) as checkpoints:
        with full_disk(300):
            checkpoints.save(state_of(1), Progress(1, 10), {})
            until = time.monotonic() + 30
            while not said and time.monotonic() < until:
                checkpoints.check()
                time.sleep(0.01)
        assert len(said) == 1 and checkpoints.newest() is None


def test_strict_saves(tmp_path):
    with opened(tmp_path, strict=True) as checkpoints, full_disk(300):
        checkpoints.save(state_of(1), Progress(1, 10), {})
        with pytest.raises(SaveFailed, match=r"step 1 was not written .*there is no complete one yet"):
            checkpoints.settle()


def test_of_several_processes_none_goes_on_beside_a_damaged_step_and_all_may_come_back(tmp_path, monkeypatch):
    saved(tmp_path, [1, 2], newest=9)
    damage = _Damaged("its record does not match its checksum")
    with opened(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        for where in ("as .*damaged/2", "by another process, in .*damaged"):
            with pytest.raises(
                Unavailable, match=rf"step 2 is damaged .*set aside {where}; run the same command again"
            ):
                checkpoints._set_aside(2, damage)
    assert steps_in(tmp_path) == [1]


def test_retention(tmp_path):
    scores = {1: math.nan, 2: 0.5, 3: 0.9, 4: math.nan, 5: 0.9, 6: 0.1}
    metrics = {step: {"eval/accuracy": score, "eval/loss": score} for step, score in scores.items()}
    saved(tmp_path / "accuracy", range(1, 9), metrics, newest=2, best=2, every=4)
    assert steps_in(tmp_path / "accuracy") == [3, 4, 5, 7, 8]
    saved(tmp_path / "first", range(1, 9), metrics, newest=1, best=1)
    assert steps_in(tmp_path / "first") == [3, 8]  # of equals the one that a run calls its best
    saved(tmp_path / "loss", range(1, 9), metrics, newest=1, best=1, metric="eval/loss")
    assert steps_in(tmp_path / "loss") == [6, 8]
    # The figures are read back: a resumed run knows the best of the run before it.
    saved(tmp_path / "loss", [9, 10], {9: {"eval/loss": 0.3}}, newest=1, best=1, metric="eval/loss")
    assert steps_in(tmp_path / "loss") == [6, 10]


def test_a_step_that_is_being_read_stays(tmp_path):
    saved(tmp_path, [1], newest=1)
    folder = readers_of(tmp_path / "checkpoints")
    folder.mkdir()
    (folder / "1-somebody").touch()
    (folder / ".DS_Store").touch()
    saved(tmp_path, [2, 3], newest=1)
    assert steps_in(tmp_path) == [1, 3]
    old = time.time() - LEASE_SECONDS - 60  # of a reader that was killed
    os.utime(folder / "1-somebody", (old, old))
    saved(tmp_path, [4], newest=1)
    assert steps_in(tmp_path) == [4]
    restore_model(tmp_path / "checkpoints", 4, abstract_of(state_of(0)).model)
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "1-somebody"]
