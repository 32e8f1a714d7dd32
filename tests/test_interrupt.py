"""SIGTERM and Ctrl-C at every point of a run: what was done is saved, and the run goes on exactly."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import command, lines_of, make_pairs, make_world, outputs_of, run, start_two, write_lines

from easyrm import train_rm
from easyrm.errors import Resumable
from easyrm.hf import directory
from easyrm.training.checkpoint import Checkpoints
from easyrm.training.interrupt import Interrupt
from easyrm.training.retention import Retention


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupt")
    settings = {**make_world(folder), "save_freq": 0, "total_steps": 4, "export": True}
    settings["data.eval"] = str(write_lines(folder / "eval.jsonl", make_pairs(1500, seed=5)))
    return settings


def signalled(settings, seen, number=signal.SIGTERM, wait=0.0, **environment):
    """A run that gets a signal `wait` seconds after a line that contains `seen`: (status, stdout, stderr, seconds)."""
    settings = {name: str(value).lower() if isinstance(value, bool) else value for name, value in settings.items()}
    process = subprocess.Popen(
        command("train_rm", settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", **environment},
    )
    before = ""
    for line in process.stdout:
        before += line
        if seen in line:
            break
    time.sleep(wait)
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=120)
    return process.returncode, before + out, err, time.monotonic() - began


def newest(folder):
    return Checkpoints(folder / "checkpoints", Retention(9), strict=True).newest()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_compiles(world, tmp_path, number):
    settings = {**world, "output_dir": str(tmp_path), "model.config": "debug", "data.max_length": 512}
    status, out, err, seconds = signalled(settings, "steps of", number, wait=0.5, JAX_ENABLE_COMPILATION_CACHE="false")
    assert status == 75, err
    assert f"stopped by {number.name} before its first step" in err and "compiled" not in out
    assert "Traceback" not in err and seconds < 10


@pytest.mark.parametrize("wait", [0.0, 0.3, 0.6])
def test_while_it_makes_the_first_state(world, tmp_path, wait):
    """XLA was seen to crash in Python's farewell where its own calls were interrupted."""
    settings = {**world, "output_dir": str(tmp_path), "total_steps": 2000, "data.eval": "", "export": False}
    status, _, err, _ = signalled(settings, "compiled", wait=wait, JAX_ENABLE_COMPILATION_CACHE="false")
    assert status == 75 and "Fatal" not in err and len(err.splitlines()) == 1, err


def test_while_it_evaluates(world, tmp_path):
    settings = {**world, "output_dir": str(tmp_path), "eval_freq": 2}
    status, _, err, _ = signalled(settings, "step 2/4", wait=0.0)
    assert status == 75, err
    assert "saved after step 2 of 4" in err and "Traceback" not in err
    assert newest(tmp_path).step == 2 and newest(tmp_path).pending_eval
    assert [line["step"] for line in run(settings) if "eval/loss" in line] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_under_the_distributed_runtime(world, tmp_path, number):
    """As on a TPU VM of one host, where JAX's preemption service takes SIGTERM and nobody asks it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = {**world, "output_dir": str(tmp_path), "total_steps": 2000, "data.eval": "", "export": False}
    alone = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    status, out, err, _ = signalled(settings, "step 3/", number, **alone)
    assert status == 75, (out, err)
    assert f"stopped by {number.name}: saved after step" in err and newest(tmp_path).step >= 3


def test_while_it_saves(world, tmp_path, monkeypatch):
    save = Checkpoints.save

    def interrupted(self, state, progress, record):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        save(self, state, progress, record)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(Resumable, match="stopped by SIGTERM: saved after step 1 of 4"):
        run({**world, "output_dir": str(tmp_path), "save_freq": 1})
    assert newest(tmp_path).step == 1


def test_while_it_exports(world, tmp_path, monkeypatch):
    settings, write = {**world, "output_dir": str(tmp_path)}, directory.save_file
    with monkeypatch.context() as patch:
        patch.setattr(directory, "save_file", lambda *args, **more: (write(*args, **more), signal.raise_signal(15)))
        with pytest.raises(Resumable, match=r"stopped by SIGTERM during the export: saved after step 4 of 4"):
            run(settings)
    before = lines_of(tmp_path)
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".export*"))
    assert run(settings) == before and (tmp_path / "export" / "config.json").exists()


def test_when_the_last_step_is_done_the_run_is_done(world, tmp_path, monkeypatch):
    """A signal that comes too late to stop anything is no failure."""
    settings = {**world, "export": False, "output_dir": str(tmp_path), "data.eval": ""}
    finish = train_rm.finish

    def late(job, progress, interrupt):
        signal.raise_signal(signal.SIGTERM)
        finish(job, progress, interrupt)

    monkeypatch.setattr(train_rm, "finish", late)
    assert len(run(settings)) == 4


def test_two_processes_stop_at_the_same_step(world, tmp_path):
    """SIGTERM reaches one of them, as when one host of a pod is taken; both save, and both go on."""
    settings = {**world, "mesh_dim": "1,8,1", "total_steps": 60, "export": "false", "eval_freq": 20}
    settings["data.eval"] = settings["data.train"]
    alone = run({**settings, "export": False, "output_dir": str(tmp_path / "alone")})
    settings["output_dir"] = str(tmp_path / "two")
    processes = start_two(settings)
    for line in processes[0].stdout:
        if line.startswith("step 5/"):
            break
    processes[1].send_signal(signal.SIGTERM)
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [75, 75], outputs
    stopped = newest(tmp_path / "two").step
    assert 5 <= stopped < 60 and all(f"saved after step {stopped} of 60" in output for output in outputs)
    processes = start_two(settings)
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"resumed after step {stopped} of 60" in outputs[0]
    assert [line["step"] for line in lines_of(tmp_path / "two") if "eval/loss" in line] == [20, 40, 60]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (lines_of(tmp_path / "two"), alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6)


LOOP = """
import time
from easyrm.training.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while True:
        if interrupt.requested():
            print("noted", flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == 128 + number


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
