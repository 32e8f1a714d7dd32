"""Stopped anywhere, a run goes on as if it had not been: bit for bit on its mesh, to rounding on another."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runs import command, lines_of, make_world, run

from easyrm.errors import InputError, NonFiniteLoss
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
    def requested(self, at):
        self.signal = signal.SIGTERM if at == step else None
        return at == step

    monkeypatch.setattr(Interrupt, "requested", requested)


@pytest.mark.parametrize("step", [1, 6, 9])
def test_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path, monkeypatch, step, capsys):
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(SystemExit) as stopped:
            run(settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"saved after step {step} of 10" in capsys.readouterr().out
    assert len(lines_of(tmp_path)) == step
    lines = run(settings)
    assert [[line[key] for key in EXACT] for line in lines] == [[line[key] for key in EXACT] for line in whole]


def test_resumed_on_another_mesh(world, tmp_path, monkeypatch):
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(SystemExit):
            run(settings)
    lines = run({**settings, "mesh_dim": "2,2,2", "data.micro_batches": 2})
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in whole], rtol=1e-5)


def test_lines_after_the_last_checkpoint_are_written_anew(world, tmp_path, monkeypatch):
    """A machine that goes away at step 6 leaves the checkpoint of step 4 and six lines."""
    settings, whole = world
    settings = {**settings, "output_dir": str(tmp_path), "save_freq": 4}
    metrics = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "requested", lambda self, at: (_ for _ in ()).throw(KeyError) if at == 7 else False)
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
    assert run({**settings, "export": True}) == first  # an export that is there is left alone


def test_a_relative_output_dir(world, tmp_path, monkeypatch):
    settings, whole = world
    monkeypatch.chdir(tmp_path)
    settings = {**settings, "output_dir": "here/run", "save_freq": 1}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run(settings)
    assert [line["loss"] for line in run(settings)] == [line["loss"] for line in whole]


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
    with pytest.raises(NonFiniteLoss, match=r"step 2: .* the last good checkpoint is 1; .*pairs.jsonl:\d+"):
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
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}: saved after step" in out and "run the same command again to resume" in out
    assert "Traceback" not in err
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert steps == [len(lines_of(tmp_path))]
