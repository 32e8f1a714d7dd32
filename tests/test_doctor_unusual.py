"""What the doctor makes of machines that are not as most: full disks, containers, drivers that hang, odd names."""

import fcntl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
from runs import run_config
from test_doctor_meeting import place_of, visit

from easyrm import distributed, ports
from easyrm.errors import InputError
from easyrm.health import following, leading, place, space, tpu, trial
from easyrm.health.examination import Examination, healthy
from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Finding
from easyrm.health.meeting import Desk, _connect
from easyrm.health.place import Place
from easyrm.health.trial import Trial


def test_what_is_but_an_estimate_fails_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e8))
    found = space.disk(run_config({"output_dir": str(tmp_path)}), None)
    assert [finding.state for finding in found] == [WARN, WARN] and all(finding.way_out for finding in found)


def test_a_disk_without_room_for_a_temporary_file(monkeypatch):
    def full():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    [found] = space.disk(run_config({}), None)
    assert found.state == FAIL and found.found.startswith("No usable temporary directory") and "TMPDIR" in found.way_out
    here = Trial()
    here.run({}, 5)
    assert here.findings[0].state == FAIL and "No usable temporary directory" in here.findings[0].found


def test_memory_of_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert space.available_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal: 90 kB\nMemAvailable:   64000000 kB\n")
    assert space.available_memory(meminfo, tmp_path) == 64e6 * 1024
    for name, text in (
        ("max", "32000000000\n"),
        ("current", "31000000000\n"),
        ("stat", "anon 6\nactive_file 1000\ninactive_file 20000000000\nshmem 9\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert space.available_memory(meminfo, tmp_path) == 21e9 + 1000  # cached files can go
    (tmp_path / "memory.max").write_text("max\n")
    assert space.available_memory(meminfo, tmp_path) == 64e6 * 1024


def test_memory_of_a_system_that_does_not_tell_it(monkeypatch):
    monkeypatch.setattr(space, "available_memory", lambda: None)
    assert space.memory(run_config({}), None, 1, accelerator=False).state == SKIPPED


def test_a_process_that_a_driver_holds(monkeypatch):
    def never(process, timeout=None):
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", never)
    here = Trial([sys.executable, "-c", "import time; time.sleep(60)"])
    here.run({}, 0.2)
    assert here.findings[0].state == FAIL and "no answer" in here.findings[0].found
    here = Trial([sys.executable, "-c", "import os; os.close(1)"])
    here.run({}, 10)
    assert here.findings[0].state == FAIL and "fell silent" in here.findings[0].found


def test_a_process_that_prints_something_else():
    here = Trial([sys.executable, "-c", "print('Welcome to this cluster!')"])
    here.run({}, 10)
    assert here.findings[0].state == FAIL and trial.CHECKS[0] == here.findings[0].check


def test_a_lock_of_a_process_that_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    device, lock = tmp_path / "accel0", tmp_path / "libtpu_lockfile"
    device.touch()
    with open(lock, "w") as file:  # nobody's lock in particular, as one from another container
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(tpu._FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
        found = tpu.look([str(device)], str(lock))
    assert found.state == FAIL and "a process of another container" in found.found and "-1" not in found.way_out


def test_the_first_platform_is_jaxs(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    for platforms, expected in (("", True), ("tpu,cpu", True), ("cpu", False), ("cpu,tpu", False)):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert distributed.asked_for("auto") == expected == bool(tpu.accelerators()), platforms


def test_a_cluster_that_cannot_name_its_hosts(monkeypatch):
    def unknown(**_):
        raise RuntimeError("Failed to recognize coordinator address rm-0.rm")

    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    cluster = SimpleNamespace(
        name="gketpu", opt_in_only_method=False, is_env_present=lambda: True, get_coordinator_address=unknown
    )
    monkeypatch.setattr(place.clusters.ClusterEnv, "_cluster_types", [cluster])
    with pytest.raises(InputError, match=r"\(gketpu\) .*Failed to recognize coordinator address rm-0\.rm"):
        place.find_place("true")


def test_a_name_that_is_none():
    assert ports.unreachable("rm..0:80") == "rm..0 is not the name of a host"
    with pytest.raises(ConnectionRefusedError, match="not the name of a host"):
        visit(Place(1, 2, "rm..0:80"), 1, seconds=1).join()


def test_who_is_in_the_door_when_it_closes_is_not_taken():
    desk = Desk(there := place_of())
    late = _connect(there.coordinator)
    late.receive(time.monotonic() + 5)
    desk.close_door()
    late.send({"index": 1, "count": 2, "host": "h1", "facts": {}, "settings": {}})
    with pytest.raises(OSError, match="closed"):
        late.receive(time.monotonic() + 5)
    assert desk.missing() == [1]


def examination(where, seconds):
    """An examination that finds nothing, but for the devices, after so many seconds."""
    found = Finding("devices", OK, f"after {seconds} s")
    return Examination(
        place=where,
        host=f"h{where.index}",
        facts={},
        settings={},
        output_dir="",
        asked={"expected": 0, "mesh_dim": "1,-1,1"},
        local=SimpleNamespace(findings=list, llama=None),
        probes=None,
        trial=SimpleNamespace(run=lambda *_: time.sleep(seconds), findings=[found], rates={}),
        began=time.monotonic(),
        wait=10,
        before=[],
    )


def test_a_host_whose_devices_take_longer_than_those_of_process_0_is_not_lost(monkeypatch):
    monkeypatch.setattr(leading, "SLACK", 0.5)
    there, ends = place_of(), []
    other = examination(Place(1, 2, there.coordinator), 3)
    thread = threading.Thread(target=lambda: ends.append(following.follow(other)))
    thread.start()
    found, names = leading.lead(examination(there, 0))
    thread.join(10)
    assert healthy(found) and (1, Finding("devices", OK, "after 3 s")) in found and names == {0: "h0", 1: "h1"}
    assert ends[0][1] is True


def test_secrets_stay_on_their_host(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "open-sesame")
    assert "sesame" not in repr(following._plain([Finding("output_dir", FAIL, "with open-sesame: refused")]))
