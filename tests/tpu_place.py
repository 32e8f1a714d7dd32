"""A checkout with a stand-in for gcloud, in which the tests of tpu.sh give its commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_neverToBeSeenOnACommandLine"
SETTINGS = {"PROJECT": "lab", "BUCKET": "gs://lab", "RUN": "rm", "POLL_SECONDS": "0"}


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


def make_template(folder: Path) -> Path:
    """A checkout with a commit that holds tpu_launch."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "tpu_launch", checkout / "tpu_launch")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "code"]):
        subprocess.run(["git", *command], cwd=checkout, check=True, timeout=60)
    return checkout


def fails(needle: str, message: str = "connection timed out", times: int = 99, after: int = 0) -> dict:
    """What the stand-in calls failures."""
    return {needle: {"message": f"ERROR: {message}", "times": times, "after": after}}


def done(place: Place) -> list[str]:
    """The deeds alone."""
    return [deed for deed in place.deeds() if deed]
