"""tpu.sh against a stand-in for gcloud: the life of a run, what brings it back, what ends it, what is refused."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_neverToBeSeenOnACommandLine"
SETTINGS = {"PROJECT": "lab", "BUCKET": "gs://lab", "RUN": "rm", "POLL_SECONDS": "0"}
COMMANDS = ["up", "create", "setup", "doctor", "launch", "logs", "status", "watch", "stop", "export", "delete"]


class Place:
    """A checkout of its own, a stand-in for gcloud, and the settings of a run, in a temporary folder."""

    def __init__(self, folder: Path, template: Path):
        self.folder, self.world, self.checkout = folder, folder / "world.json", folder / "checkout"
        self.settings = {**SETTINGS, "HF_TOKEN_FILE": str(folder / "token")}
        (folder / "token").write_text(TOKEN)
        shutil.copytree(template, self.checkout)
        (folder / "bin").mkdir()
        stand_in = folder / "bin" / "gcloud"
        stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/gcloud_stand_in.py "$@"\n')
        stand_in.chmod(0o755)
        self.play([{"states": ["ACTIVE"], "units": ["over"]}])

    def play(self, lives: list[dict], **world) -> None:
        """Begin anew, with no slice, no calls so far, and these slices to come."""
        empty = {"life": None, "bucket": True, "exported": False, "failures": {}, "calls": []}
        self.world.write_text(json.dumps({**empty, "lives": lives, **world}))

    def tpu(self, *words: str, path: str = "", **settings: str) -> subprocess.CompletedProcess:
        """tpu.sh with `words`."""
        environment = {"PATH": path or f"{self.folder}/bin:{os.environ['PATH']}", "HOME": str(self.folder)}
        return subprocess.run(
            [self.checkout / "tpu_launch" / "tpu.sh", *words],
            env={**environment, "WORLD": str(self.world), **self.settings, **settings},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list[str]]:
        """Every argv so far."""
        return [call["argv"] for call in json.loads(self.world.read_text())["calls"]]

    def deeds(self) -> list[str]:
        """What was done, in a word each, without the questions."""
        words = {"queued-resources create": "create", "tpu-vm create": "create now", "worker.sh setup": "setup"}
        words |= {"worker.sh launch": "launch", "delete": "delete", "rsync": "fetch", "disable --now": "stop"}
        lines = [" ".join(call) for call in self.calls()]
        return [next((word for needle, word in words.items() if needle in line), "") for line in lines]


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A checkout with a commit that holds tpu_launch."""
    checkout = tmp_path_factory.mktemp("template") / "checkout"
    shutil.copytree(ROOT / "tpu_launch", checkout / "tpu_launch")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "code"]):
        subprocess.run(["git", *command], cwd=checkout, check=True, timeout=60)
    return checkout


@pytest.fixture
def place(tmp_path, template) -> Place:
    """See Place."""
    return Place(tmp_path, template)


def done(place: Place) -> list[str]:
    """The deeds alone."""
    return [deed for deed in place.deeds() if deed]


def test_up_brings_a_preempted_run_to_its_end(place):
    waits = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    first = {"states": [*waits, "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], "units": ["going"]}
    units = ["going+going", "restarting+booting", "over+going", "over+over"]
    place.play([first, {"states": [*waits, "ACTIVE"], "units": units}])
    result = place.tpu("up")
    assert result.returncode == 0, result.stderr
    life = ["create", "setup", "launch", "delete"]
    assert done(place) == [*life, *life[:3], "fetch", "delete"]
    assert json.loads(place.world.read_text())["life"] is None
    assert all(
        call["settings"]
        == {"CLOUDSDK_CORE_PROJECT": "lab", "CLOUDSDK_COMPUTE_ZONE": "us-east5-a", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
        for call in json.loads(place.world.read_text())["calls"]
    )


def test_up_on_a_run_that_is_done_takes_no_slice(place):
    place.play([], exported=True)
    assert place.tpu("up").returncode == 0
    assert done(place) == ["fetch"]


def test_up_keeps_the_slice_and_leaves_the_model_where_asked(place):
    assert place.tpu("up", DELETE_WHEN_DONE="false", EXPORT_TO="").returncode == 0
    assert done(place) == ["create", "setup", "launch"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("provisioning", ["spot", "on-demand"])
def test_dry_run_prints_what_a_run_calls(place, command, provisioning):
    flags = "--data.train=gs://lab/a*.jsonl --license=it's"
    settings = {"PROVISIONING": provisioning, "TRAIN_FLAGS": flags, "NETRC_FILE": str(place.folder / "token")}
    looks = {"up": 2, "watch": 1}.get(command, 9)  # before a dry run has the slice preempted
    life = {"launched": command not in ("up", "create"), "units": ["going"]}
    life |= {"states": ["ACTIVE"] * looks + ["SUSPENDED"], "nodes": ["READY"] * looks + ["PREEMPTED"]}
    second = {"states": ["ACTIVE"], "nodes": ["READY"], "units": ["over"]}
    if life["launched"]:
        place.play([second], life=life, exported=command == "export")
    else:
        place.play([life, second])
    shown = place.tpu("--dry-run", command, path="/usr/bin:/bin", **settings)
    assert shown.returncode == 0 and not place.calls(), shown.stderr
    lines = [shlex.split(line, comments=True) for line in shown.stdout.splitlines()]
    result = place.tpu(command, **settings)
    assert result.returncode == 0, result.stderr
    assert [line for line in lines if line[:1] == ["gcloud"]] == place.calls()
    said = [shlex.split(line[2:]) for line in result.stderr.splitlines() if line.startswith("+ ")]
    assert [line for line in lines if line in said] == said


def test_dry_run_shows_the_placeholders_and_a_run_refuses_them(place):
    shown = place.tpu("--dry-run", "up", PROJECT="your-project", HF_TOKEN_FILE="nowhere", path="/usr/bin:/bin")
    assert shown.returncode == 0 and "your-project" in shown.stdout
    refused = place.tpu("up", PROJECT="your-project")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "PROJECT=your-project" in refused.stderr


def test_the_readme_shows_what_dry_run_prints_today():
    shown = [block.strip() for block in re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)]
    shown = [re.sub(r"\s*\\\n\s*", " ", block) for block in shown]
    settings = {"HOME": "/home/me", "PROJECT": "lab", "BUCKET": "gs://lab-rm", "RUN": "rm70b"}
    for command, first in (("up", 0), ("logs", -1)):
        printed = subprocess.run(
            [ROOT / "tpu_launch" / "tpu.sh", "--dry-run", command],
            env={"PATH": os.environ["PATH"], **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        commit = re.search(r"setup (\w+) tpu", printed)
        printed = printed.replace(commit[1], "COMMIT") if commit else printed
        deeds = [line for line in printed.splitlines() if not re.search("describe|systemctl show|storage ls", line)]
        assert "\n".join(deeds[first:]) in shown


def test_a_line_that_refers_to_another_takes_what_the_environment_says(place):
    settings = (place.checkout / "tpu_launch" / "settings.env").read_text()
    assert 'TRAIN_FLAGS="--model.init_from=$BUCKET/' in settings
    place.settings.pop("TRAIN_FLAGS", None)
    assert "--model.init_from=gs://other/llama" in place.tpu("--dry-run", "launch", BUCKET="gs://other").stdout


def test_everything_may_be_said_twice(place):
    assert "no slice" in place.tpu("delete").stderr
    assert "nothing runs" in place.tpu("stop").stderr
    for _ in range(2):
        result = place.tpu("create")
        assert result.returncode == 0
    assert "exists already, in state READY" in result.stderr
    assert "nothing runs" in place.tpu("stop").stderr  # nothing was launched
    assert place.tpu("delete").returncode == place.tpu("delete").returncode == 0
    assert done(place) == ["create", "delete"]


def test_provisioning_decides_what_is_asked_for(place):
    for provisioning in ("queued", "spot", "on-demand"):
        place.play([{"states": ["ACTIVE"]}])
        assert place.tpu("create", PROVISIONING=provisioning, CREATE_FLAGS="--network=n").returncode == 0
        (create,) = [call for call in place.calls() if "create" in call]
        assert create[3] == ("tpu-vm" if provisioning == "on-demand" else "queued-resources")
        assert create[-1] == "--network=n" and ("--spot" in create) == (provisioning == "spot")


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
        (["stopped+stopped"], 75, []),
        (["killed early+over"], 75, []),
        (["going+over", "over+over"], 0, []),
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


def fails(needle: str, message: str = "connection timed out", times: int = 99, after: int = 0) -> dict:
    """What the stand-in calls failures."""
    return {needle: {"message": f"ERROR: {message}", "times": times, "after": after}}


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
    assert done(place) == ["create", "setup", "setup", "setup", "launch", "fetch", "delete"]
    place.play([], failures=fails("describe"))
    assert place.tpu("watch").returncode == 1
    assert len(place.calls()) == 10


@pytest.mark.parametrize(
    ("needle", "message", "way_out"),
    [
        ("describe", "You do not currently have an active account selected.", "gcloud auth login"),
        ("create", "Quota limit 'TPUV5PPerProjectPerZone' has been exceeded.", "no quota for spot v5p-64"),
        ("create", 'There is no more capacity in the zone "us-east5-a"', "PROVISIONING=queued or spot waits"),
        ("create", "INVALID_ARGUMENT: accelerator type v5p-64 is not available", "accelerator-types list"),
        ("create", "PERMISSION_DENIED: Permission denied on 'locations/us-east5-a'", "gcloud compute tpus locations"),
        ("scp", 'SSH Key is not present in the SSH agent. Please run "ssh-add KEY"', "ssh-agent"),
    ],
)
def test_gcloud_s_words_and_a_way_out(place, needle, message, way_out):
    place.play([{"states": ["ACTIVE"]}], failures=fails(needle, message))
    if needle == "scp":
        assert place.tpu("create").returncode == 0
    result = place.tpu("setup" if needle == "scp" else "create")
    assert result.returncode == 1
    assert message in result.stderr + result.stdout and way_out in result.stderr


def test_a_bucket_that_is_missing_and_a_gcloud_that_is(place):
    place.play([], bucket=False)
    result = place.tpu("up")
    assert result.returncode == 2 and "gcloud storage buckets create gs://lab" in result.stderr
    result = place.tpu("create", path=without_gcloud(place))
    assert result.returncode == 1 and "cloud.google.com/sdk/docs/install" in result.stderr


def without_gcloud(place: Place) -> str:
    """A PATH with the few programs that come before the first gcloud."""
    (place.folder / "few").mkdir()
    for program in ("bash", "dirname", "env", "cat"):
        (place.folder / "few" / program).symlink_to(shutil.which(program))
    return str(place.folder / "few")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PROVISIONING", "cheap"),
        ("BUCKET", "lab"),
        ("RUN", "Tulu_2"),
        ("ZONE", ""),
        ("ACCELERATOR_TYPE", "v7-8"),
        ("DELETE_WHEN_DONE", "yes"),
        ("HF_TOKEN_FILE", "/nowhere"),
        ("BUCKET", "gs://your-bucket"),
    ],
)
def test_bad_settings_are_refused_in_one_line(place, key, value):
    result = place.tpu("up", **{key: value})
    assert result.returncode == 2 and not place.calls()
    assert result.stderr.count("\n") == 1 and key in result.stderr and value in result.stderr


def test_only_what_is_committed_goes_out(place):
    settings = place.checkout / "tpu_launch" / "settings.env"
    settings.write_text(settings.read_text().replace("us-east5-a", "us-central1-a"))  # this alone is no reason
    assert place.tpu("create").returncode == place.tpu("setup").returncode == 0
    (place.checkout / "tpu_launch" / "worker.sh").write_text("changed")
    result = place.tpu("setup")
    assert result.returncode == 2 and "tpu_launch/worker.sh" in result.stderr


def test_no_secret_is_written_anywhere(place):
    (place.folder / "netrc").write_text(f"machine api.wandb.ai password {TOKEN}")
    result = place.tpu("up", NETRC_FILE=str(place.folder / "netrc"), TRAIN_FLAGS="--wandb_project=rm")
    assert result.returncode == 0
    assert TOKEN not in place.world.read_text() + result.stdout + result.stderr
    copies = [call[5:7] for call in place.calls() if "scp" in call]
    assert [str(place.folder / "token"), "rm:.cache/huggingface/token"] in copies
    assert [str(place.folder / "netrc"), "rm:.netrc"] in copies
