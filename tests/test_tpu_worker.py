"""What runs on a worker: worker.sh in a home of its own, its unit, and the flags and commands that tpu.sh hands on."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from absl import flags

from easyrm.distributed import report
from easyrm.errors import InputError, NonFiniteLoss, Resumable, SaveFailed
from easyrm.flags import define_run_flags, run_config
from easyrm.peers import PEER_LOST

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "tpu_launch"
RESUMABLE, PEER, BAD_INPUT, DEFECT = (
    Resumable.STATUS,
    PEER_LOST,
    report(InputError("bad input")),
    report(RuntimeError("a defect")),
)
# Each records its call; sudo does what it is asked below $HOME, systemctl keeps one state.
STAND_INS = {
    "curl": "cat",
    "sh": 'mkdir -p "$UV_UNMANAGED_INSTALL"; cp "$HOME/bin/uv" "$UV_UNMANAGED_INSTALL/uv"',
    "uv": 'if [ "$1" = --version ]; then echo "uv $VERSION"; fi; if [ "$1" = venv ]; then mkdir -p venv/bin; '
    'ln -sf "$HOME/bin/python" venv/bin/python; fi',
    "python": 'echo "$PWD $*"',
    "sudo": 'p=$1; shift; for w; do shift; case $w in /etc/*) w=$HOME$w;; esac; set -- "$@" "$w"; done; exec "$p" "$@"',
    "systemctl": 'case "$*" in *show*) echo "ActiveState=$(cat "$HOME/active" 2>/dev/null || echo inactive)";; '
    '*"--now"*) echo activating > "$HOME/active";; esac',
}


class Worker:
    """A home as tpu.sh setup finds it, with stand-ins for what changes a machine."""

    def __init__(self, home: Path):
        self.home = home
        for folder in ("bin", "etc/systemd/system"):
            (home / folder).mkdir(parents=True)
        for name, body in STAND_INS.items():
            script = home / "bin" / name
            script.write_text(f'#!/bin/bash\necho "{name} $*" >> "$HOME/calls"\n{body}\n')
            script.chmod(0o755)
        self.unit = home / "etc/systemd/system/easyrm.service"

    def run(self, command: str) -> subprocess.CompletedProcess:
        """A remote command of tpu.sh, from the home directory."""
        (self.home / "calls").write_text("")
        environment = {"HOME": str(self.home), "PATH": f"{self.home}/bin:{os.environ['PATH']}"}
        environment["VERSION"] = re.search(r"^UV=(\S+)", (LAUNCH / "worker.sh").read_text(), re.MULTILINE)[1]
        return subprocess.run(
            ["bash", "-c", command], cwd=self.home, env=environment, capture_output=True, text=True, timeout=60
        )

    def setup(self, commit: str = "abc", secrets: str = ".cache/huggingface/token .netrc"):
        """As after the archive was unpacked."""
        shutil.copytree(LAUNCH, self.home / "easyrm/next/tpu_launch")
        return self.run(f"bash easyrm/next/tpu_launch/worker.sh setup {commit} tpu,gcs {secrets}")

    def launch(self, *words: str):
        """As tpu.sh launch."""
        return self.run(f"bash easyrm/code/tpu_launch/worker.sh launch {shlex.join(words)}")

    def calls(self, name: str) -> list[str]:
        """The calls of one stand-in during the last command."""
        return [line for line in (self.home / "calls").read_text().splitlines() if line.split()[0] == name]


@pytest.fixture
def worker(tmp_path) -> Worker:
    """See Worker."""
    return Worker(tmp_path)


def test_setup_installs_what_is_pinned_once(worker):
    result = worker.setup()
    assert result.returncode == 0, result.stderr
    assert "uv pip install --quiet --python ../venv --constraint constraints.txt --editable .[tpu,gcs]" in worker.calls(
        "uv"
    )
    assert "uv venv --quiet --allow-existing --python 3.11 venv" in worker.calls("uv")
    again = worker.setup()
    assert again.returncode == 0 and "already set up" in again.stdout
    assert not worker.calls("uv") and not worker.calls("curl") and not (worker.home / "easyrm/next").exists()
    assert worker.setup("def").returncode == 0 and worker.calls("uv") and not worker.calls("curl")


def test_places_for_secrets_are_private_before_and_after(worker):
    worker.setup()
    for name in (".cache/huggingface/token", ".netrc"):
        secret = worker.home / name
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        secret.write_text("kept")
        secret.chmod(0o644)
    worker.setup()
    assert all(
        (worker.home / name).read_text() == "kept" and stat.S_IMODE((worker.home / name).stat().st_mode) == 0o600
        for name in (".cache/huggingface/token", ".netrc")
    )


def test_launch_says_when_it_runs_and_refuses_other_flags_and_code(worker):
    worker.setup()
    assert worker.launch("--recipe=x").returncode == 0
    assert "systemctl enable --quiet --now easyrm" in worker.calls("systemctl")
    again = worker.launch("--recipe=x")
    assert again.returncode == 0 and "already" in again.stdout
    assert all("show" in call for call in worker.calls("systemctl"))
    for other in (worker.launch("--recipe=y"), worker.setup("def")):
        assert other.returncode == 2 and "tpu.sh stop" in other.stderr
    doctor = worker.run("bash easyrm/code/tpu_launch/worker.sh doctor --recipe=x")
    assert doctor.returncode == 2 and "holds the TPU" in doctor.stderr
    (worker.home / "active").unlink()
    doctor = worker.run("bash easyrm/code/tpu_launch/worker.sh doctor --recipe=x")
    assert doctor.stdout == f"{worker.home}/easyrm/code -m easyrm.doctor --recipe=x\n"


def settings_of(unit: Path) -> dict[str, str]:
    """The unit's settings; none is given twice but Environment."""
    lines = [line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and line[0] not in "#["]
    return dict(lines)


def test_systemd_finds_no_fault_with_the_unit_and_reads_the_flags_as_they_were(worker):
    worker.setup()
    words = ["--data.train=gs://lab/100%/a $HOME.jsonl", '--run="\\x"', "--license=it's"]
    assert worker.launch(*words).returncode == 0
    command = settings_of(worker.unit)["ExecStart"]
    assert "100%%/a $$HOME.jsonl" in command
    undone = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(command)]
    assert undone == [f"{worker.home}/easyrm/venv/bin/python", "-m", "easyrm.train_rm", *words]
    assert "@" not in worker.unit.read_text()
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is absent")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", worker.unit], capture_output=True, text=True, timeout=60
    )
    faults = [line for line in checked.stderr.splitlines() if "easyrm.service" in line]
    assert checked.returncode == 0 and not faults, checked.stderr


def restarts(rules: dict[str, str], status: int) -> bool:
    """Whether systemd starts the service again by itself after it exited: systemd.service(5)."""
    statuses = {name: {int(word) for word in rules.get(name, "").split()} for name in rules if name.endswith("Status")}
    if status in statuses["RestartPreventExitStatus"]:
        return False
    if status in statuses["RestartForceExitStatus"]:
        return True
    clean = status == 0 or status in statuses["SuccessExitStatus"]
    return not clean and rules["Restart"] == "on-failure"


def test_the_unit_restarts_what_the_same_command_resumes():
    rules = settings_of(LAUNCH / "easyrm.service")
    assert (RESUMABLE, PEER, BAD_INPUT, DEFECT) == (75, 69, 2, 1)  # what watch.sh and the README speak of
    assert {status for status in range(256) if not restarts(rules, status)} == {0, BAD_INPUT}
    assert report(NonFiniteLoss("inf", 1, before=True)) == report(SaveFailed("full")) == BAD_INPUT
    assert {int(word) for word in rules["RestartForceExitStatus"].split()} == {PEER, RESUMABLE}
    assert rules["SuccessExitStatus"] == str(RESUMABLE)  # tpu.sh stop leaves no failed unit
    assert int(rules["StartLimitBurst"]) < 10 and rules["StartLimitIntervalSec"] == "6h"
    assert rules["TimeoutStopSec"] == "20min" and rules["WantedBy"] == "multi-user.target"
    assert "KillSignal" not in rules  # SIGTERM, which train_rm answers with a save


def dry_run(*words: str, **settings: str) -> list[list[str]]:
    """The commands that tpu.sh shows, as argv."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/me", **settings}
    shown = subprocess.run(
        [LAUNCH / "tpu.sh", "--dry-run", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [shlex.split(line, comments=True) for line in shown.stdout.splitlines()]


def test_a_setup_that_was_cut_off_may_be_given_again(worker):
    # gcloud gives a command again, by itself, where the connection broke.
    (remote,) = [line[-1].removeprefix("--command=") for line in dry_run("setup") if "ssh" in line]
    with tarfile.open(worker.home / re.search(r"easyrm-\w+\.tar\.gz", remote)[0], "w:gz") as archive:
        archive.add(LAUNCH, "tpu_launch")
    uv = worker.home / "bin" / "uv"
    uv.rename(worker.home / "uv")
    assert worker.run(remote).returncode != 0
    (worker.home / "uv").rename(uv)
    assert worker.run(remote).returncode == 0
    assert not list(worker.home.glob("*.tar.gz"))


@pytest.mark.parametrize("recipe", ["llama3.1-tulu2-70b-uf", "tulu2.5-13b-uf"])
def test_the_default_launch_is_a_run(recipe):
    (remote,) = [line[-1] for line in dry_run("launch", RECIPE=recipe) if line[:1] == ["gcloud"]]
    words = shlex.split(remote.removeprefix("--command="))
    assert words[:3] == ["bash", "easyrm/code/tpu_launch/worker.sh", "launch"]
    values = flags.FlagValues()
    define_run_flags(values, ["train_rm", *words[3:]])
    values(["train_rm", *words[3:]])
    config = run_config(values)
    config.validate()
    assert config.output_dir == "gs://your-bucket/llama31-tulu2-70b-uf" and config.export
    assert config.distributed_timeout > 600  # a host that reboots is waited for
    assert config.recipe == recipe and config.save_minutes == 15


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-64", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_follows_the_type_and_the_readme_says_so(accelerator, runtime):
    (create,) = [line for line in dry_run("create", ACCELERATOR_TYPE=accelerator) if "create" in line]
    assert f"--accelerator-type={accelerator}" in create and f"--runtime-version={runtime}" in create
    table = [line for line in (LAUNCH / "README.md").read_text().splitlines() if f"`{accelerator}`" in line]
    assert any(f"`{runtime}`" in line for line in table)
    (create,) = [line for line in dry_run("create", RUNTIME_VERSION="other") if "create" in line]
    assert "--runtime-version=other" in create


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is absent")
def test_gcloud_itself_knows_every_command_and_flag(tmp_path):
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    lines = [*dry_run("up"), *dry_run("stop"), *dry_run("up", PROVISIONING="on-demand")]
    wanted: dict[tuple, set] = {}
    for line in (line for line in lines if line[:1] == ["gcloud"]):
        end = 5 if line[1] == "compute" else 4 if "buckets" in line else 3
        given = {word.split("=")[0] for word in line[end:] if word.startswith("--")}
        wanted.setdefault(tuple(line[:end]), set()).update(given - {"--format"})  # every command has that
    assert len(wanted) == 11
    for command, given in wanted.items():
        helped = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=60)
        known = re.sub(r"\x1b\[[0-9;]*m", "", helped.stdout)  # bold
        assert helped.returncode == 0 and given <= set(re.split(r"[\s=\[\]]+", known)), command


@pytest.mark.skipif(
    not shutil.which("shellcheck", path=f"{Path(sys.executable).parent}"), reason="shellcheck is absent"
)
@pytest.mark.parametrize("script", sorted(LAUNCH.rglob("*.sh")), ids=lambda script: script.name)
def test_shellcheck(script):
    command = [Path(sys.executable).parent / "shellcheck", script]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
