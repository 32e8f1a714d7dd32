"""tpu.sh watch, which brings a run back until it is done, against a stand-in for gcloud."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tpu_place import Place, done, fails, make_template


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def place(tmp_path, template) -> Place:
    return Place(tmp_path, template)


def test_a_slice_that_is_gone_is_created_again(place):
    place.play([{"states": ["ACTIVE"]}], life={"launched": True, "states": ["SUSPENDED"]})
    assert place.tpu("create").returncode == 0
    assert done(place) == ["delete", "create"]


@pytest.mark.parametrize(
    ("units", "status", "deeds"),
    [
        (["going+going", "refused+lost", "going+going"], 2, ["stop"]),
        (["restarting+refused"], 2, ["stop"]),
        (["lost+defect"], 1, ["stop"]),
        (["signalled+going"], 1, ["stop"]),
        (["stopped+stopped"], 75, []),
        (["killed early+over"], 75, []),
        (["going+over", "over+over"], 0, []),
        (["noise+going", "noise+over"], 0, []),
    ],
)
def test_what_ends_a_watch(place, units, status, deeds):
    place.play([], life={"launched": True, "states": ["ACTIVE"], "units": units})
    result = place.tpu("watch")
    assert (result.returncode, done(place)) == (status, deeds), result.stderr
    assert ("no such file" in result.stdout) == bool(deeds)
    assert not deeds or f"with status {status}" in result.stderr


@pytest.mark.parametrize(("provisioning", "node"), [("spot", "PREEMPTED"), ("on-demand", "TERMINATED")])
def test_a_node_may_be_gone_before_its_request_says_so(place, node, provisioning):
    life = {"launched": True, "states": ["ACTIVE"], "nodes": ["READY", node], "units": ["going"]}
    place.play([{"states": ["ACTIVE"], "units": ["over"]}], life=life)
    assert place.tpu("watch", PROVISIONING=provisioning).returncode == 0
    create = "create" if provisioning == "spot" else "create now"
    assert done(place) == ["delete", create, "setup", "launch"]


@pytest.mark.parametrize(("before", "after", "status"), [("stopped", "stopped", 75), ("refused", "refused", 2)])
def test_up_resumes_a_run_that_was_ended_once(place, before, after, status):
    place.play([], life={"launched": True, "states": ["ACTIVE"], "units": [before, "going", after]})
    assert place.tpu("up").returncode == status
    assert done(place) == ["setup", "launch"] + ["stop"] * (status == 2)


def test_a_slice_that_someone_deletes_stays_deleted_and_a_request_that_fails_is_not_made_for_ever(place):
    place.play([], life={"launched": True, "states": ["ACTIVE", "FORGOTTEN"], "units": ["going"]})
    result = place.tpu("watch")
    assert result.returncode == 75 and not done(place), result.stderr
    place.play([{"states": ["FAILED"]}] * 20)
    assert place.tpu("up").returncode == 1
    assert done(place).count("create") == 10


def test_a_network_that_fails_for_a_while_ends_nothing(place):
    life = {"states": ["WAITING_FOR_RESOURCES", "ACTIVE"], "units": ["going", "over"]}
    failures = fails("systemctl", times=3) | fails("setup", times=2) | fails("describe", times=4, after=2)
    place.play([life], failures=failures)
    result = place.tpu("up")
    assert result.returncode == 0, result.stderr
    assert done(place) == ["create", "setup", "setup", "setup", "launch", "delete", "fetch"]
    place.play([], failures=fails("describe"))
    assert place.tpu("watch").returncode == 1
    assert len(place.calls()) == 10


def test_a_deed_that_fails_for_good_ends_up_and_a_look_that_fails_does_not(place):
    place.play([{"states": ["ACTIVE"], "units": ["going"]}], failures=fails("worker.sh setup", times=1000))
    result = place.tpu("up")
    assert result.returncode == 1 and done(place) == ["create"] + ["setup"] * 10
    assert "tpu.sh delete gives it back" in result.stderr
    life = {"launched": True, "states": ["ACTIVE"], "units": ["going", "over"]}
    place.play([], life=life, failures=fails("describe", times=30, after=2))
    assert place.tpu("watch").returncode == 0
    place.play([{"states": ["WAITING_FOR_RESOURCES", "ACTIVE"]}], failures=fails("describe", times=30, after=3))
    assert place.tpu("create").returncode == 0


def test_a_slice_whose_deletion_was_not_seen_through_is_created_again(place):
    gone = {"launched": True, "states": ["SUSPENDED", "DELETING", "FORGOTTEN"]}
    place.play([{"states": ["ACTIVE"], "units": ["over"]}], life=gone, failures=fails("delete", times=1))
    result = place.tpu("watch")
    assert result.returncode == 0 and done(place) == ["delete", "create", "setup", "launch"], result.stderr


def test_the_slice_is_given_back_before_the_model_is_fetched_and_whatever_it_takes(place):
    failures = fails("delete", times=12) | fails("rsync", "no space left on device")
    place.play([{"states": ["ACTIVE"], "units": ["over"]}], failures=failures)
    result = place.tpu("up")
    assert result.returncode == 1 and done(place)[3:] == ["delete"] * 13 + ["fetch"], result.stderr


def test_who_interrupts_a_wait_is_told_what_is_still_held(place):
    place.play([{"states": ["WAITING_FOR_RESOURCES"]}])
    environment = {"PATH": f"{place.folder}/bin:{os.environ['PATH']}", "HOME": str(place.folder)}
    with subprocess.Popen(
        [place.checkout / "tpu_launch" / "tpu.sh", "up"],
        env={**environment, "WORLD": str(place.world), **place.settings, "POLL_SECONDS": "60"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        lines = iter(process.stderr.readline, "")
        assert any("looking again every 60 s" in line for line in lines)
        os.killpg(process.pid, signal.SIGINT)
        assert "tpu.sh delete gives it back" in "".join(lines) and process.wait(30) == 130
