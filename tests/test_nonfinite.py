"""A loss or gradient that is not finite: it never reaches the parameters, and it names its step and its pairs."""

import json

import pytest
from etils import epath
from runs import lines_of, make_pairs, make_world, run, write_lines

from easyrm.errors import NonFiniteLoss
from easyrm.training.checkpoint import Checkpoints
from easyrm.training.nonfinite import NonFinite
from easyrm.training.retention import Retention

EXACT = ("loss", "grad_norm", "param_norm", "learning_rate")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten steps of four pairs in file order; the margin that weighs pair 17, of step 5, makes its gradient overflow."""
    folder = tmp_path_factory.mktemp("nonfinite")
    settings = {**make_world(folder), "loss.type": "scaled_bradley_terry", "data.shuffle": False, "save_freq": 0}
    pairs = make_pairs(40, margin=lambda i: 1.0)
    settings["data.train"] = str(write_lines(folder / "sane.jsonl", pairs))
    pairs[17]["margin"] = 3e38
    return settings, str(write_lines(folder / "poisoned.jsonl", pairs))


def digests_of(folder, step):
    checkpoints = Checkpoints(folder / "checkpoints", Retention(9), strict=True)
    return checkpoints._records[step]["arrays"]


def exact(lines):
    return [[line[key] for key in EXACT] for line in lines]


def test_stop_keeps_the_state_before_and_says_what_reproduces_it(world, tmp_path):
    settings, poisoned = world
    with pytest.raises(NonFiniteLoss, match=r"step 5: .*poisoned.jsonl:18.*the last good checkpoint is 4") as stopped:
        run({**settings, "data.train": poisoned, "output_dir": str(tmp_path / "stopped")})
    assert stopped.value.step == 5
    before = run({**settings, "save_freq": 4, "output_dir": str(tmp_path / "sane"), "keep_checkpoints": 9})
    assert exact(lines_of(tmp_path / "stopped")) == exact(before[:4])
    assert digests_of(tmp_path / "stopped", 4) == digests_of(tmp_path / "sane", 4)
    (line,) = [json.loads(text) for text in (tmp_path / "stopped/nonfinite.jsonl").read_text().splitlines()]
    assert line["step"] == 5 and line["grad_norm"] in ("inf", "nan") and line["skipped"] is False
    assert [pair.rsplit(":", 1)[1] for pair in line["pairs"]] == ["17", "18", "19", "20"]
    # The same command meets the same step; with skip the run goes on from there.
    with pytest.raises(NonFiniteLoss, match="step 5"):
        run({**settings, "data.train": poisoned, "output_dir": str(tmp_path / "stopped")})
    more = {"data.train": poisoned, "output_dir": str(tmp_path / "stopped"), "on_nonfinite": "skip"}
    lines = run({**settings, **more})
    assert [line["step"] for line in lines] == list(range(1, 11)) and lines[4]["skipped"] == 1


def test_skip_leaves_one_update_out_and_counts_it(world, tmp_path, capsys):
    settings, poisoned = world
    settings = {**settings, "on_nonfinite": "skip", "save_freq": 1, "keep_checkpoints": 9}
    lines = run({**settings, "data.train": poisoned, "output_dir": str(tmp_path / "poisoned")})
    assert lines[4] == {"step": 5, "skipped": 1, "pairs": 4}
    assert "1 updates were skipped" in capsys.readouterr().out
    before, after = (digests_of(tmp_path / "poisoned", step) for step in (4, 5))
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(before[name][:2] == ["int32", []] for name in changed)  # the counts of steps
    # The learning rate goes by the step, whether or not its update was made.
    sane = run({**settings, "output_dir": str(tmp_path / "sane")})
    assert exact(lines[:4]) == exact(sane[:4])
    assert [line["learning_rate"] for line in lines[5:]] == [line["learning_rate"] for line in sane[5:]]


@pytest.mark.parametrize("skip", [True, False])
def test_what_cannot_be_left_out_is_not_advised(tmp_path, skip):
    """Parameters that have overflowed are lost; a loss that is not finite never reached them."""
    nonfinite, values = NonFinite(epath.Path(tmp_path), skip=skip, most=0), {"loss": 1.0, "grad_norm": 1.0}
    with pytest.raises(NonFiniteLoss, match=r"look at its pairs \(a:1\)$"):
        nonfinite.met(1, {**values, "param_norm": float("inf")}, lambda: ["a:1"])
    with pytest.raises(NonFiniteLoss, match="--max_nonfinite" if skip else "--on_nonfinite=skip"):
        nonfinite.met(2, {**values, "loss": float("nan"), "param_norm": 1.0}, lambda: ["a:1"])


def test_too_many_in_a_row_stop(world, tmp_path):
    settings, _ = world
    pairs = make_pairs(40, margin=lambda i: 3e38 if 8 <= i < 24 else 1.0)  # steps 3 to 6
    settings = {**settings, "data.train": str(write_lines(tmp_path / "pairs.jsonl", pairs)), "on_nonfinite": "skip"}
    with pytest.raises(NonFiniteLoss, match=r"step 6: .*number 4 such step in a row"):
        run({**settings, "max_nonfinite": 3, "output_dir": str(tmp_path / "three")})
    lines = run({**settings, "max_nonfinite": 4, "output_dir": str(tmp_path / "four")})
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4, 5, 6]
