"""Stopped anywhere, a run goes on as if it had not been: bit for bit on its mesh, to rounding on another."""

import itertools
import json
import os
import signal
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
from runs import command, lines_of, make_tokenizer, make_world, run, run_config

from easyrm.errors import InputError, NonFiniteLoss, Resumable
from easyrm.run import check_output_dir, read_record
from easyrm.training.interrupt import Interrupt

EXACT = ("loss", "accuracy", "grad_norm", "param_norm", "learning_rate", "chosen_reward_mean", "tokens_computed")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    settings = {**make_world(folder), "num_epochs": 1.5, "mesh_dim": "1,8,1", "save_freq": 0}
    settings["data.batch_size"] = 7  # batches cross the end of the epoch
    whole = run({**settings, "output_dir": str(folder / "whole")})
    assert len(whole) == 10
    return settings, whole


def stop_after(monkeypatch, step):
    """Have the run find, before the step that follows `step`, that a signal has come."""
    calls = itertools.count()

    def requested(self):
        self.signal = signal.SIGTERM if next(calls) >= step else None
        return self.signal is not None

    monkeypatch.setattr(Interrupt, "requested", requested)


def run_until(monkeypatch, settings, step):
    """A run that is stopped after `step`."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Resumable, match=f"saved after step {step} of") as stopped:
            run(settings)
    assert stopped.value.code == 75


@pytest.mark.parametrize("step", [1, 6, 9])
def test_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path, monkeypatch, step):
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path)}
    run_until(monkeypatch, settings, step)
    assert len(lines_of(tmp_path)) == step
    lines = run(settings)
    assert [[line[key] for key in EXACT] for line in lines] == [[line[key] for key in EXACT] for line in whole]


def test_resumed_on_another_mesh(world, tmp_path, monkeypatch):
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path)}
    run_until(monkeypatch, settings, 4)
    lines = run({**settings, "mesh_dim": "2,2,2", "data.micro_batches": 2})
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in whole], rtol=1e-5)


@pytest.mark.parametrize("change", [{"data.row_length": 512}, {"data.micro_batches": 3}, {"data.packing": False}])
def test_resumed_with_other_rows(world, tmp_path, monkeypatch, change):
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path), "mesh_dim": "1,2,1"}
    run_until(monkeypatch, settings, 5)
    before = read_record(tmp_path)["row_shapes"], settings.get("data.micro_batches", 1)
    lines = run({**settings, **change})
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in whole], rtol=1e-5)
    assert (read_record(tmp_path)["row_shapes"], change.get("data.micro_batches", 1)) != before


def test_a_changed_batch_size_goes_on_at_the_same_pair(world, tmp_path, monkeypatch, capsys):
    """The position counts pairs: of 72 in 1.5 epochs, 28 came in four steps, and 14 steps of 3 take all but 2."""
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path), "mesh_dim": "1,1,1"}
    run_until(monkeypatch, settings, 4)
    changed = {**settings, "data.batch_size": 3}
    with pytest.raises(InputError, match=r"--data.batch_size=3 \(there: 7\).*--allow_config_change"):
        run(changed)
    capsys.readouterr()
    lines = run({**changed, "allow_config_change": True})
    out = capsys.readouterr().out
    assert "note: " in out and "resumed after step 4 of 18, 28 pairs into the data" in out
    assert "18 steps of 3 pairs: 70 pairs, 1.46 epochs, 2 left over" in out
    assert [line["pairs"] for line in lines] == 4 * [7] + 14 * [3]
    assert "48 pairs read = 48 trained on" in out
    # And it resumes exactly from there as well.
    stopped = {**changed, "output_dir": str(tmp_path), "allow_config_change": True}
    assert run(stopped) == lines


def test_an_evaluation_cut_short_is_made_by_the_resumed_run(world, tmp_path, monkeypatch):
    settings, _ = world
    settings = {**settings, "data.eval": settings["data.train"], "eval_freq": 3, "mesh_dim": "1,1,1", "num_epochs": 1.0}
    whole = run({**settings, "output_dir": str(tmp_path / "whole")})
    evaluations = [line for line in whole if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    settings["output_dir"] = str(tmp_path / "stopped")
    for asked in (5, 8):  # 3 steps, then in the first evaluation; the last evaluation of the resumed run
        with monkeypatch.context() as patch:
            stop_after(patch, asked)
            with pytest.raises(Resumable, match="saved after step"):
                run(settings)
    lines = run(settings)
    assert [line for line in lines if "eval/loss" in line] == evaluations
    assert [[line[key] for key in EXACT] for line in lines if "loss" in line] == [
        [line[key] for key in EXACT] for line in whole if "loss" in line
    ]


def test_best_and_milestones_stay(world, tmp_path):
    settings, _ = world
    settings = {**settings, "data.eval": settings["data.train"], "eval_freq": 2, "mesh_dim": "1,1,1"}
    keep = {"keep_best": 2, "best_metric": "eval/loss", "keep_every": 5, "save_freq": 5, "keep_checkpoints": 1}
    lines = run({**settings, **keep, "output_dir": str(tmp_path)})
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    best = sorted(losses, key=losses.get)[:2]
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {*best, 5, 10}


def test_minutes_between_saves(world, tmp_path, monkeypatch):
    settings, _ = world
    now = itertools.count(0, 30)  # seconds: half a minute each time that somebody looks
    clock = types.SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr("easyrm.training.save_clock.time", clock)
    run({**settings, "save_minutes": 2.0, "keep_checkpoints": 9, "mesh_dim": "1,1,1", "output_dir": str(tmp_path)})
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {4, 8, 10}


def test_what_changed_is_named(world, tmp_path):
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path / "run"), "total_steps": 1, "mesh_dim": "1,1,1"}
    run(settings)
    other = make_tokenizer(tmp_path / "other.model", vocab_size=300)
    settings["tokenizer"] = str(other)
    with pytest.raises(InputError, match=r"--tokenizer=.*other.model \(there: .*tokenizer.model\)"):
        run(settings)
    # Under the same name as well, and then by its vocabulary and by the tokens that it makes.
    original = Path(world[0]["tokenizer"]).read_bytes()
    try:
        Path(world[0]["tokenizer"]).write_bytes(other.read_bytes())
        with pytest.raises(InputError, match=r"other data or tokens .*tokenizer vocab_size=300 \(there: 320\)"):
            run({**settings, "tokenizer": world[0]["tokenizer"]})
    finally:
        Path(world[0]["tokenizer"]).write_bytes(original)
    template = json.loads((tmp_path / "run" / "config.json").read_text())
    assert template["tokenizer"]["vocab_size"] == 320
    (tmp_path / "run" / "config.json").write_text(json.dumps({**template, "total_steps": 7}))
    with pytest.raises(InputError, match=r"config.json: changed after the run wrote it"):
        run(settings)


def test_without_config_json_a_checkpoint_says_what_run_it_is(world, tmp_path):
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path), "total_steps": 2, "mesh_dim": "1,1,1"}
    run(settings)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"another configuration: --seed=1 \(there: 0\)"):
        run({**settings, "seed": 1})
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(settings["data.train"]).read_text().splitlines(True)[1:]))
    with pytest.raises(InputError, match="other data"):
        run({**settings, "data.train": str(other)})
    assert len(run(settings)) == 2 and (tmp_path / "config.json").exists()


def test_lines_after_the_last_checkpoint_are_written_anew(world, tmp_path, monkeypatch):
    """A machine that goes away at step 6 leaves the checkpoint of step 4 and six lines."""
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path), "save_freq": 4}
    metrics = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        calls = itertools.count()
        patch.setattr(
            Interrupt, "requested", lambda self: (_ for _ in ()).throw(KeyError) if next(calls) == 7 else False
        )
        with pytest.raises(KeyError):
            run(settings)
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')
    lines = run(settings)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_finished_run_has_nothing_left_to_do(world, tmp_path, capsys):
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path), "total_steps": 2}
    first = run(settings)
    again = run({**settings, "export": True})
    assert again == first and (tmp_path / "export" / "model.safetensors").exists()
    capsys.readouterr()
    assert run({**settings, "export": True}) == first  # an export that is there is left alone
    assert "stays as it is\n" in capsys.readouterr().out
    run({**settings, "export": True, "total_steps": 3, "allow_config_change": True})
    assert "stays as it is: not step 3 in bf16; remove it for that" in capsys.readouterr().out


def test_a_relative_output_dir(world, tmp_path, monkeypatch):
    settings, whole = world
    monkeypatch.chdir(tmp_path)
    settings = {**settings, "output_dir": "here/run", "save_freq": 1}
    run_until(monkeypatch, settings, 2)
    assert [line["loss"] for line in run(settings)] == [line["loss"] for line in whole]


def test_a_setting_that_is_newer_than_the_run_had_its_default(tmp_path, monkeypatch):
    settings = {"output_dir": str(tmp_path), "data.train": "pairs.jsonl", "model.config": "debug"}
    old = run_config(settings).to_dict()
    del old["eval"], old["loss"]["soft_labels"]
    monkeypatch.setattr("easyrm.run.find_record", lambda _: {"config": old})
    check_output_dir(run_config(settings), print)
    with pytest.raises(InputError, match=r"another configuration: --loss.soft_labels=True \(there: False\)"):
        check_output_dir(run_config({**settings, "loss.soft_labels": True}), print)


def test_another_configuration_or_other_data_is_refused(world, tmp_path):
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path), "total_steps": 1}
    run(settings)
    with pytest.raises(InputError, match=r"another configuration: --optimizer.lr=0.5 \(there: 0.001\)"):
        run({**settings, "optimizer.lr": 0.5})
    other = tmp_path / "other.jsonl"
    lines = Path(settings["data.train"]).read_text().splitlines(True)
    other.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="other data"):
        run({**settings, "data.train": str(other)})


def test_a_non_finite_step_names_itself_its_pairs_and_the_last_checkpoint(world, tmp_path):
    settings, _ = world
    settings = {**settings, "save_freq": 1, "output_dir": str(tmp_path)}  # the first update has learning rate 0
    with pytest.raises(NonFiniteLoss, match=r"step 2: .*pairs.jsonl:\d+.*the last good checkpoint is 1"):
        run({**settings, "optimizer.lr": 1e38, "optimizer.warmup_ratio": 0.2})
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(world, tmp_path, number):
    settings, _ = world
    settings = {**settings, "output_dir": str(tmp_path), "num_epochs": 400.0, "mesh_dim": "1,1,1"}
    process = subprocess.Popen(
        command("train_rm", settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"stopped by {number.name}: saved after step" in err and "run the same command again to resume" in err
    assert "Traceback" not in err
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert steps == [len(lines_of(tmp_path))]
