"""Whole examinations by two real processes: healthy hosts, and each sickness found and named within a minute."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time

import flax
import pytest
from runs import command, make_world
from test_doctor import TOKEN, shadow

SECONDS = 60  # within which a process has to end, sick or not


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait_for(port):
    """Until someone listens there."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.2)


def start(settings, indices=(0, 1), port=None, paths=None):
    """The processes `indices` of two, with four CPU devices each; `paths` is PYTHONPATH by index."""
    if port is None:
        port = free_port()
    coordination = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "HF_TOKEN": TOKEN}
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return [
        subprocess.Popen(
            command("doctor", settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **coordination, **flags, "JAX_PROCESS_ID": str(index)}
            | ({"PYTHONPATH": str(paths[index])} if paths and index in paths else {}),
        )
        for index in indices
    ]


def ends(processes):
    """(exit status, what it printed) of each."""
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def lines_of(text, check):
    """The text of a check in a table, its lines joined; "" where it has none."""
    lines, found = text.splitlines(), []
    for line in lines:
        if line[:1] != " ":
            inside = line.startswith(f"{check} ")
        if inside:
            found.append(line)
    return " ".join(" ".join(found).split())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    settings = make_world(folder) | {"mesh_dim": "1,-1,1", "data.eval": f"{folder}/pairs.jsonl"}
    return folder, settings


@pytest.fixture(scope="module")
def healthy(world):
    folder, settings = world
    before = sorted(os.listdir(folder))
    found = ends(start({**settings, "output_dir": folder / "run", "devices": 8}))
    assert sorted(os.listdir(folder)) == before, "it leaves nothing"
    return found


@pytest.fixture(scope="module")
def sick(world):
    """All the sick ones at the same time, for most of theirs is waiting."""
    folder, settings = world
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        older = {1: shadow(folder / "older", "flax", "0.12.1")}
        under_a_file = {**settings, "output_dir": folder / "pairs.jsonl" / "run"}
        began = time.monotonic()
        runs = {
            "held": start({}, indices=(0,), port=holder.getsockname()[1]),
            "versions": start(under_a_file, paths=older),
            "no 1": start({"wait": 6}, indices=(0,)),
            "no 0": start({"wait": 6, "json": True}, indices=(1,)),
            "stopped": start({"output_dir": folder / "run"}, indices=(0,), port=(port := free_port())),
        }
        wait_for(port)
        runs["stopped"][0].send_signal(signal.SIGTERM)
        found = {name: ends(processes) for name, processes in runs.items()}
    assert time.monotonic() - began < SECONDS
    return found


def test_healthy_hosts(healthy):
    (status, table), (status_1, own) = healthy
    assert (status, status_1) == (0, 0), table + own
    assert max(map(len, table.splitlines())) <= 100
    assert lines_of(table, "hosts").endswith("2 of 2 came")
    assert "8 devices of kind cpu, 4 on this host, as expected (--devices=8)" in lines_of(table, "devices")
    assert "dp 1, fsdp 8, mp 1" in lines_of(table, "mesh")
    for check in ("output_dir", "shared", "versions", "coordinator", "model", "tokenizer", "data.train", "data.eval"):
        assert lines_of(table, check).startswith(f"{check} ok 0-1 "), table
    assert "GB/s a device, right over 8 devices" in lines_of(table, "all-reduce")
    assert "TFLOP/s a device" in lines_of(table, "matmul") and "a token is set" in lines_of(table, "hub")
    assert table.splitlines()[-1].startswith("healthy: ")
    assert own.count("\n") == 1 and "nothing is its own; all hosts are healthy: process 0 (localhost)" in own


def test_a_token_is_never_printed(healthy, sick):
    for _, text in [*healthy, *(end for found in sick.values() for end in found)]:
        assert TOKEN not in text and TOKEN[3:20] not in text


def test_a_process_is_missing(sick):
    [(status, table)] = sick["no 1"]
    assert status == 2 and re.search("1 of 2 came within [0-9]+ s; missing: process 1 ->", lines_of(table, "hosts"))
    assert "JAX_NUM_PROCESSES=2" in lines_of(table, "hosts") and "skipped" in lines_of(table, "devices")


def test_process_0_is_missing(sick):
    [(status, found)] = sick["no 0"]
    assert status == 2 and '"healthy": false' in found
    assert re.search(r"cannot reach localhost:\d+ \(Connection refused\), tried for \d+ s", found)


def test_another_version_and_a_directory_that_cannot_be_made(sick):
    (status, table), (status_1, own) = sick["versions"]
    assert (status, status_1) == (2, 2)
    for text in (table, own):
        assert f"flax is 0.12.1 on host 1, but {flax.__version__} on host 0" in lines_of(text, "versions")
        assert "pairs.jsonl is a file, not a directory" in lines_of(text, "output_dir")
    assert lines_of(table, "output_dir").startswith("output_dir FAIL 0-1")
    assert "the versions on host 1 are not right" in lines_of(table, "devices")


def test_another_program_holds_the_port(sick):
    [(status, table)] = sick["held"]
    assert status == 2 and f"held by pid {os.getpid()} (" in lines_of(table, "coordinator")


def test_a_stop_is_heeded(sick, world):
    [(status, _)] = sick["stopped"]
    assert status == 128 + signal.SIGTERM and not [name for name in os.listdir(world[0]) if name.startswith(".")]


def test_packages_that_do_not_load(tmp_path):
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").write_text("raise ImportError('needs jax 0.99')")
    [(status, said)] = ends(start({}, indices=(0,), paths={0: tmp_path}))
    assert status == 2 and said.count("\n") == 1
    assert "a package does not load (ImportError: needs jax 0.99); installed are jax 0" in said
