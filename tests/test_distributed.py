"""Several processes: they meet or say why not, mean the same run or say what differs, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from easyrm import agreement, peers
from easyrm.distributed import start_distributed, who_is_who
from easyrm.errors import InputError, Unavailable

# What every process of these tests runs: a command without a trainer. `me` is the index of the process.
PROGRAM = """
import sys, time
from easyrm import peers
from easyrm.agreement import agree
from easyrm.distributed import start_distributed
from easyrm.errors import InputError, Resumable
from easyrm.flags import run_command

# With less, a busy machine is taken for a lost one.
peers.HEARTBEAT, peers.LAST = 15, 5

def main():
    start_distributed("auto", {timeout})
    me = peers.here().index
    print("met", flush=True)
    {body}
    print("end", flush=True)

run_command(main)
"""
SECONDS = 60  # within which everything here must end


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(body: str, *, indices=(0, 1), count=2, port=None, timeout=SECONDS) -> list[subprocess.Popen]:
    """Start the processes `indices` of `count`, each of which runs `body` when they have met."""
    port = port or free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(body=body, timeout=timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in indices
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, list[str]]]:
    """(exit status, lines of stderr) of each process; the test fails where one does not end."""
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, errors.splitlines()) for process, (_, errors) in zip(processes, outputs, strict=True)]


def test_a_normal_end_is_silent():
    """Also where one process has more to do at the end."""
    assert ends(start("me or time.sleep(3)")) == [(0, []), (0, [])]


def test_only_process_0_logs_more_than_warnings():
    body = "import logging; log = logging.getLogger('x'); log.setLevel('INFO')"
    processes = start(f"{body}; log.info('much'); log.warning('careful')")
    said = [(status, [line.split()[-1] for line in lines]) for status, lines in ends(processes)]
    assert said == [(0, ["much", "careful"]), (0, ["careful"])]


def test_a_missing_host():
    port, began = free_port(), time.monotonic()
    [(status, lines), (status_2, lines_2)] = ends(start("pass", indices=(0, 2), count=3, port=port, timeout=5))
    assert (status, status_2) == (peers.PEER_LOST, peers.PEER_LOST) and time.monotonic() - began < 30
    address = f"localhost:{port}"
    assert lines[0].startswith(f"easyrm: process 0 of 3: waited 5 s as the coordinator at {address}")
    assert "waited 5 s" in lines_2[0] and address in lines_2[0] and len(lines) == len(lines_2) == 1
    assert "--distributed_timeout" in lines[0] and "--distributed_timeout" in lines_2[0]


def test_no_coordinator_at_the_address():
    port = free_port()
    [(status, lines)] = ends(start("pass", indices=(1,), port=port, timeout=3))
    assert status == peers.PEER_LOST and len(lines) == 1
    assert f"the coordinator at localhost:{port}, which cannot be reached (Connection refused)" in lines[0]


def test_the_port_is_in_use():
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        [(status, lines)] = ends(start("pass", indices=(0,), port=port))
    assert status == 2 and len(lines) == 1
    assert f"process 0 of 2 cannot listen on the port of JAX_COORDINATOR_ADDRESS=localhost:{port}" in lines[0]


def test_disagreement_is_named_by_all():
    """And while one waits for the other, it says so."""
    facts = "{'seed': me, 'data': {'train': 'x', 'eval': 'y' * me}, 'same': [1, 2]}"
    late = "peers.NOTE = 1; time.sleep(8 * me)"
    found = ends(start(f"agree({{'code': 1}}, 'code'); {late}; agree({facts}, 'settings')"))
    assert found[0][1][0] == "easyrm: process 0 of 2 waits for process 1 (settings)"
    for index, (status, lines) in enumerate(found):
        lines = [line for line in lines if " waits for process " not in line]
        assert status == 2 and len(lines) == 1
        assert lines[0].startswith(
            f"easyrm: process {index} of 2: processes disagree (settings): "
            'data.eval is "" on process 0 and "y" on process 1; seed is 0 on process 0 and 1 on process 1.'
        )


def test_an_exception_ends_all():
    """The others wait for ever, as in a collective operation, and are ended all the same."""
    began = time.monotonic()
    found = ends(start("assert me, 'so\\nand so'; time.sleep(1000)"))
    assert time.monotonic() - began < 40
    status, lines = found[0]
    assert status == 1 and lines[0] == "easyrm: process 0 of 2: failed"
    assert "Traceback (most recent call last):" in lines and lines[-2:] == ["AssertionError: so", "and so"]
    followed = "easyrm: process 0 of 2 failed: AssertionError: so and so; stopping"
    assert found[1] == (peers.PEER_LOST, [followed])


def test_who_was_lost_is_told_to_those_who_were_not():
    """A collective fails on all that are left; whoever first misses the lost one's beats says so, and all stop."""
    lost = "\n    while len(peers.here()._beats) < 3: time.sleep(0.1)\n    if me == 2: os._exit(9)\n    time.sleep(6)"
    failed = "\n    raise JaxRuntimeError('INTERNAL: Connection closed by peer')"
    found = ends(
        start(f"import os\n    from jax.errors import JaxRuntimeError{lost}{failed}", indices=(0, 1, 2), count=3)
    )
    assert [status for status, _ in found] == [peers.PEER_LOST, peers.PEER_LOST, 9]
    for index in (0, 1):
        assert all("process 2" in line for line in found[index][1] if line.startswith("easyrm:")), found[index]
        assert found[index][1][0].startswith("easyrm: process"), found[index]


def test_an_error_of_jax_alone_is_not_blamed_on_another():
    """Where all others live, it is a defect of this process: its traceback and status 1, not a restart for ever."""
    body = "\n    from jax.errors import JaxRuntimeError\n    time.sleep(2)"
    runs = [
        start(f"{body}\n    if me == {bad}: raise JaxRuntimeError('INTERNAL: x')\n    time.sleep(1000)")
        for bad in (0, 1)
    ]
    found = ends([process for run in runs for process in run])
    assert [status for status, _ in found] == [1, peers.PEER_LOST, peers.PEER_LOST, 1]
    for bad, (_, lines) in ((0, found[0]), (1, found[3])):
        assert lines[0] == f"easyrm: process {bad} of 2: failed" and lines[-1].endswith("JaxRuntimeError: INTERNAL: x")
    assert found[1][1] == ["easyrm: process 0 of 2 failed: JaxRuntimeError: INTERNAL: x; stopping"]


def test_bad_input_ends_all():
    found = ends(start("\n    if me == 1: raise InputError('--x=1: choose 2')\n    time.sleep(1000)"))
    assert found[1] == (2, ["easyrm: process 1 of 2: --x=1: choose 2"])
    assert found[0] == (peers.PEER_LOST, ["easyrm: process 1 of 2 failed: --x=1: choose 2; stopping"])


def test_a_stop_on_one_process_stops_all_with_its_status():
    """Whoever starts the command again on status 75 has to see it on every host."""
    quick = "peers._GRACE['ended'] = 2"
    found = ends(start(f"{quick}\n    if me == 1: raise Resumable('saved')\n    time.sleep(1000)"))
    assert found == [
        (75, ["easyrm: process 1 of 2 ended: saved; stopping"]),
        (75, ["easyrm: process 1 of 2: saved"]),
    ]


def test_a_process_that_says_nothing_more():
    """Killed or frozen, it cannot say so; JAX aborts the other one, which says whom it lost."""
    cases = [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
    runs = [start("time.sleep(1000)") for _ in cases]
    processes = [process for run in runs for process in run]
    try:
        for process in processes:
            assert process.stdout.readline() == "met\n"
        time.sleep(3)  # for one beat each
        for run, (bad, number) in zip(runs, cases, strict=True):
            run[bad].send_signal(number)
        for run, (bad, _) in zip(runs, cases, strict=True):
            errors = run[1 - bad].communicate(timeout=SECONDS)[1]
            assert run[1 - bad].returncode == peers.PEER_LOST, errors
            lost = "process 1, silent for " if bad else "process 0, the coordinator at localhost:"
            assert f"easyrm: process {1 - bad} of 2 lost {lost}" in errors.splitlines()[-1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


ALONE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}


def test_who_is_who():
    assert who_is_who(ALONE) is None
    assert who_is_who(ALONE | {"JAX_NUM_PROCESSES": "1"}) == ("10.0.0.1:1234", 1, 0)
    assert who_is_who(ALONE | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}) == ("10.0.0.1:1234", 3, 2)


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1: give HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host:http"}, "JAX_COORDINATOR_ADDRESS=host:http: give HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host:99999"}, "JAX_COORDINATOR_ADDRESS=host:99999: give HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES=x: give the number"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0: give the number"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not set: give each of the 2"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: give a number from 0 to 1"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: give a number from 0 to 1"),
    ],
)
def test_a_malformed_environment(environment, match, monkeypatch):
    for name, value in (ALONE | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        start_distributed("auto")
    assert peers.here() is None


def test_a_machine_that_cannot_yet_say_which_hosts_there_are(monkeypatch):
    """As a TPU VM's metadata server that is not up: who starts lost runs again has to start this one."""
    monkeypatch.setattr("jax.distributed.initialize", Mock(side_effect=ConnectionError("refused")))
    with pytest.raises(Unavailable, match=r"does not start yet \(refused\)"):
        start_distributed("true")
    assert peers.here() is None


def test_differences():
    same = {"a": 1}
    assert agreement.differences([same, same, same]) == []
    seeds = [{"seed": int(index == 5), **same} for index in range(7)]
    assert agreement.differences(seeds) == ["seed is 0 on processes 0, 1, 2, 3 and 2 more and 1 on process 5"]
    assert agreement.differences([same, {}]) == ["a is 1 on process 0 and absent on process 1"]
    [long] = agreement.differences([{"path": "x" * 100 + end + "y" * 100} for end in "ab"])
    assert "xay" in long and "xby" in long and len(long) < 160


def test_alone_there_is_nothing_to_agree_on():
    agreement.agree({"seed": 1}, "settings")


def test_the_code_version_follows_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    for name in ("agreement.py", "recipes/x.toml"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "agreement.py"))
    seen = {agreement.code_version(), agreement.code_version()}
    (tmp_path / "recipes" / "x.toml").write_text("a = 2\n")
    seen.add(agreement.code_version())
    (tmp_path / "recipes" / "x.toml").rename(tmp_path / "recipes" / "y.toml")
    seen.add(agreement.code_version())
    assert len(seen) == 3
