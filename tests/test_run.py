"""A run from end to end: what it writes, what it counts, and that each knob does something."""

import contextlib
import json
import os

import numpy as np
import pytest
from runs import call, full_disk, lines_of, make_pairs, make_world, run, write_lines

from easyrm import train_rm
from easyrm.errors import InputError, SaveFailed
from easyrm.training.checkpoint import Checkpoints

KEYS = {
    "step", "loss", "accuracy", "chosen_reward_mean", "rejected_reward_mean", "chosen_reward_std",
    "rejected_reward_std", "margin", "learning_rate", "grad_norm", "param_norm", "pairs", "pairs_per_second",
    "tokens_per_second", "tokens_computed", "tokens_unique", "step_time",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_lines(folder / "eval.jsonl", make_pairs(11, seed=1))
    settings = {**make_world(folder), "data.eval": str(folder / "eval.jsonl"), "total_steps": 6, "save_freq": 0}
    return settings, run({**settings, "eval_freq": 4, "output_dir": str(folder / "base")}), folder


def test_files_and_keys(world):
    settings, lines, folder = world
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == KEYS for line in training)
    evaluations = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluations] == [4, 6] and evaluations[0]["eval/pairs"] == 11
    record = json.loads((folder / "base" / "config.json").read_text())
    assert record["config"]["data"]["train"] == settings["data.train"]
    assert record["data"]["train"]["kept"] == 48 and len(record["data"]["train"]["fingerprint"]) == 64
    assert record["versions"]["jax"] and record["total_steps"] == 6
    assert [path.name for path in (folder / "base" / "checkpoints").iterdir()] == ["6"]


def test_evaluation_is_a_mean_over_pairs_whatever_the_batches(world, tmp_path):
    """Eleven pairs in batches of 4 leave one slot empty, in batches of 11 none."""
    settings, lines, _ = world
    last = [line for line in lines if "eval/loss" in line][-1]
    one = {**settings, "data.train": settings["data.eval"], "data.batch_size": 11, "total_steps": 1}
    one |= {"optimizer.lr": 0.0, "data.shuffle": False, "output_dir": str(tmp_path)}
    line, evaluation = run(one)
    assert line["loss"] == pytest.approx(evaluation["eval/loss"], rel=1e-5)
    assert line["accuracy"] == pytest.approx(evaluation["eval/accuracy"])
    assert line["chosen_reward_mean"] == pytest.approx(evaluation["eval/chosen_reward_mean"], abs=1e-6)
    assert last["eval/loss"] != evaluation["eval/loss"]


def test_tokens_are_counted_as_they_are(world):
    """Unique tokens of a whole epoch: those of the data set; the device computes at least these."""
    settings, _, folder = world
    record = json.loads((folder / "base" / "config.json").read_text())
    epoch = run({**settings, "total_steps": 12, "output_dir": str(folder / "epoch")})
    epoch = [line for line in epoch if "loss" in line]
    assert sum(line["tokens_unique"] for line in epoch) == record["data"]["train"]["tokens_unique"]
    shapes = {
        rows * length for rows, length in json.loads((folder / "epoch" / "config.json").read_text())["row_shapes"]
    }
    assert {line["tokens_computed"] for line in epoch} <= shapes
    assert all(line["tokens_computed"] >= line["tokens_unique"] for line in epoch)


# Knobs of the loss and of the optimizer have their own tests; here, one of each shows that they arrive.
KNOBS = {
    "seed": 1,
    "dtype": "bf16",
    "data.shuffle": False,
    "data.batch_size": 3,
    "optimizer.lr": 2e-3,
    "loss.label_smoothing": 0.2,
    "model.score_std": 0.5,
}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_changes_the_losses(world, tmp_path, name):
    settings, lines, _ = world
    base = [line["loss"] for line in lines if "loss" in line]
    changed = run({**settings, "data.eval": "", name: KNOBS[name], "output_dir": str(tmp_path)})
    losses = [line["loss"] for line in changed]
    assert len(losses) == 6 and np.abs(np.array(losses) - base).max() > 1e-7


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.remat", "nothing_saveable"), ("data.packing", False), ("data.row_length", 512), ("data.micro_batches", 2)],
)
def test_what_must_not_change_the_losses(world, tmp_path, name, value):
    settings, lines, folder = world
    changed = run({**settings, "data.eval": "", name: value, "output_dir": str(tmp_path)})
    np.testing.assert_allclose(
        [line["loss"] for line in changed], [line["loss"] for line in lines if "loss" in line], rtol=1e-5
    )
    if name in ("data.packing", "data.row_length"):
        before, after = (
            json.loads((path / "config.json").read_text())["row_shapes"] for path in (folder / "base", tmp_path)
        )
        assert before != after


def test_margins_change_the_losses(world, tmp_path):
    settings, _, _ = world
    write_lines(tmp_path / "margins.jsonl", make_pairs(48, margin=lambda i: 0.5 + i % 3))
    settings = {**settings, "data.train": str(tmp_path / "margins.jsonl"), "data.eval": ""}
    losses = [
        [line["loss"] for line in run({**settings, **how, "output_dir": str(tmp_path / str(i))})]
        for i, how in enumerate([{}, {"loss.margin": True}, {"loss.type": "scaled_bradley_terry"}])
    ]
    assert losses[0][0] < losses[1][0] and losses[0][0] < losses[2][0]


def test_profile_and_compilation_cache(world, tmp_path):
    settings, _, _ = world
    settings = {**settings, "data.eval": "", "output_dir": tmp_path / "run", "compilation_cache": tmp_path / "cache"}
    result = call("train_rm", {**settings, "profile_steps": "2,3"})
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert any("train_step" in path.name for path in (tmp_path / "cache").iterdir())
    with pytest.raises(InputError, match="--profile_steps=3"):
        run({**settings, "profile_steps": "3"})


def test_log_freq_and_tensorboard(world, tmp_path, monkeypatch):
    settings, _, _ = world
    written, closed = [], []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

        def close(self):
            closed.append(self)

    module = type("tensorboardX", (), {"SummaryWriter": Writer})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", module)
    lines = run({**settings, "data.eval": "", "log_freq": 3, "tensorboard": True, "output_dir": str(tmp_path)})
    assert [line["step"] for line in lines] == [3, 6]
    assert {("loss", 3), ("loss", 6)} <= set(written) and len(closed) == 1


def test_real_pairs_train_without_a_warning(shared, tmp_path):
    """All 4,408 HH-RLHF pairs are accounted for; a few steps are trained."""
    settings = {
        "model.config": "debug",
        "tokenizer": shared / "tokenizers" / "llama2",
        "data.train": shared / "data" / "hh_train.jsonl.gz",
        "data.max_length": 512,
        "data.batch_size": 8,
        "total_steps": 3,
        "output_dir": tmp_path,
    }
    result = call("train_rm", settings, PYTHONWARNINGS="always", JAX_ENABLE_COMPILATION_CACHE="false")
    assert result.returncode == 0, result.stderr
    assert "warning" not in (result.stdout + result.stderr).lower()
    report = json.loads((tmp_path / "config.json").read_text())["data"]["train"]
    assert report["read"] == 4408 == report["kept"] + sum(report["dropped"].values())
    assert len(lines_of(tmp_path)) == 3


def test_a_disk_that_fills_at_the_end_is_said_and_the_command_finishes_later(world, tmp_path, monkeypatch):
    """Neither the last save nor the export can be written; the run ends with one line, and resumes."""
    settings, lines, _ = world
    settings = {**settings, "eval_freq": 4, "save_freq": 5, "export": True, "output_dir": str(tmp_path)}
    save = Checkpoints.save

    def save_on_a_full_disk(self, state, progress, record):
        limit = full_disk(300) if progress.step == 6 else contextlib.nullcontext()
        with limit:
            save(self, state, progress, record)
            self.settle()

    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        patch.setattr(train_rm, "export_run", lambda *_, **__: os.write(full, b"x"))
        with pytest.raises(SaveFailed, match=r"the export to .* failed .*saved after step 5 of 6.*step 6 is not"):
            run(settings)
        patch.setattr(train_rm, "export_run", lambda *_, **__: None)
        with pytest.raises(SaveFailed, match=r"the run is trained, but saved after step 5 of 6"):
            run(settings)
    again = run(settings)
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in lines if "loss" in line]
    assert (tmp_path / "export" / "config.json").exists()
