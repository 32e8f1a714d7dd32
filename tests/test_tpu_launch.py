"""tpu.sh against a stand-in for gcloud: the life of a run, what ends it, what is refused."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tpu_place import ROOT, TOKEN, Place, done, fails, make_template

COMMANDS = ["up", "create", "setup", "doctor", "launch", "logs", "status", "watch", "stop", "export", "delete"]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def place(tmp_path, template) -> Place:
    return Place(tmp_path, template)


def test_up_brings_a_preempted_run_to_its_end(place):
    waits = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    first = {"states": [*waits, "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], "units": ["going"]}
    units = ["going+going", "restarting+booting", "over+going", "over+over"]
    place.play([first, {"states": [*waits, "ACTIVE"], "units": units}])
    result = place.tpu("up")
    assert result.returncode == 0, result.stderr
    life = ["create", "setup", "launch", "delete"]
    assert done(place) == [*life, *life[:3], "delete", "fetch"]
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
    life = {"launched": command not in ("up", "create"), "units": ["going"], "queued": provisioning != "on-demand"}
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


@pytest.mark.parametrize(("was", "now"), list(itertools.permutations(("queued", "spot", "on-demand"), 2)))
def test_a_slice_is_given_back_however_it_was_requested(place, was, now):
    assert place.tpu("create", PROVISIONING=was).returncode == place.tpu("delete", PROVISIONING=now).returncode == 0
    deleted = [call[3] for call in place.calls() if "delete" in call]
    assert deleted == ["tpu-vm" if was == "on-demand" else "queued-resources"]
    assert "no slice" in place.tpu("delete", PROVISIONING=was).stderr


@pytest.mark.parametrize(
    ("needle", "message", "way_out"),
    [
        ("describe", "You do not currently have an active account selected.", "gcloud auth login"),
        ("create", "Quota limit 'TPUV5PPerProjectPerZone' has been exceeded.", "no quota for spot v5p-64"),
        ("create", 'There is no more capacity in the zone "us-east5-a"', "PROVISIONING=queued or spot waits"),
        ("create", "INVALID_ARGUMENT: accelerator type v5p-64 is not available", "accelerator-types list"),
        ("create", "PERMISSION_DENIED: Permission denied on 'locations/us-east5-a'", "gcloud compute tpus locations"),
        ("scp", 'may have happened if you have not added your SSH key with "ssh-add"', ""),
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
    assert way_out or "ssh-agent" not in result.stderr  # that line is there whenever a worker does not answer


def test_a_bucket_that_is_missing_and_a_gcloud_that_is(place):
    place.play([], bucket=False)
    result = place.tpu("up")
    assert result.returncode == 2 and "gcloud storage buckets create gs://lab" in result.stderr
    result = place.tpu("create", path=without_gcloud(place))
    assert result.returncode == 1 and "cloud.google.com/sdk/docs/install" in result.stderr


def test_who_may_not_look_at_the_bucket_may_use_it_and_one_far_away_is_said(place):
    place.play([{"states": ["ACTIVE"]}], failures=fails("buckets describe", "me does not have permission to access b"))
    result = place.tpu("create")
    assert result.returncode == 0 and done(place) == ["create"], result.stderr
    for zone, far in (("us-east5-a", False), ("us-central2-b", True)):
        place.play([{"states": ["ACTIVE"]}])
        assert ("BUCKET=gs://lab is in US-EAST5" in place.tpu("create", ZONE=zone).stderr) == far


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is absent")
def test_a_key_without_a_passphrase_needs_no_agent(place):
    for phrase in ("secret", "", None):
        key = place.folder / ".ssh" / "google_compute_engine"
        key.unlink(missing_ok=True)
        key.parent.mkdir(exist_ok=True)
        if phrase is not None:  # else gcloud makes one, without a passphrase
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", key]
            subprocess.run(command, input="y\n", text=True, check=True, timeout=60)
        place.play([{"states": ["ACTIVE"]}])
        assert place.tpu("create", SSH_AUTH_SOCK="/nowhere").returncode == 0
        agents = {call["agent"] for call in json.loads(place.world.read_text())["calls"]}
        assert agents == {phrase == "secret"}


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
        ("BUCKET", "gs://lab/"),
        ("TRAIN_FLAGS", "--seed=1\n--num_epochs=2"),
        ("DELETE_WHEN_DONE", "yes"),
        ("HF_TOKEN_FILE", "/nowhere"),
        ("HF_TOKEN_FILE", "setup.cfg"),  # is here, and not in the checkout, from which everything is copied
        ("BUCKET", "gs://your-bucket"),
    ],
)
def test_bad_settings_are_refused_in_one_line(place, key, value):
    result = place.tpu("up", **{key: value})
    assert result.returncode == 2 and not place.calls()
    assert result.stderr.count("\n") == 1 and key in result.stderr and value.split("\n")[0] in result.stderr


def test_only_what_is_committed_goes_out(place):
    settings = place.checkout / "tpu_launch" / "settings.env"
    settings.write_text(settings.read_text().replace("us-east5-a", "us-central1-a"))  # this alone is no reason
    assert place.tpu("create").returncode == place.tpu("setup").returncode == 0
    (place.checkout / "tpu_launch" / "worker.sh").write_text("changed")
    result = place.tpu("setup")
    assert result.returncode == 2 and "tpu_launch/worker.sh" in result.stderr


def test_a_new_file_of_code_that_would_stay_behind_is_named(place):
    (place.checkout / "easyrm" / "recipes").mkdir(parents=True)
    (place.checkout / "my.env").write_text("")  # no code
    assert place.tpu("create").returncode == place.tpu("setup").returncode == 0
    (place.checkout / "easyrm" / "recipes" / "mine.toml").write_text("")
    result = place.tpu("setup")
    assert result.returncode == 2 and "easyrm/recipes/mine.toml" in result.stderr


def test_no_secret_is_written_anywhere(place):
    (place.folder / "netrc").write_text(f"machine api.wandb.ai password {TOKEN}")
    result = place.tpu("up", NETRC_FILE=str(place.folder / "netrc"), TRAIN_FLAGS="--wandb_project=rm")
    assert result.returncode == 0
    assert TOKEN not in place.world.read_text() + result.stdout + result.stderr
    copies = [call[5:7] for call in place.calls() if "scp" in call]
    assert [str(place.folder / "token"), "rm:.cache/huggingface/token"] in copies
    assert [str(place.folder / "netrc"), "rm:.netrc"] in copies
