"""A stand-in for gcloud: records how it is called and plays the slice, the workers and the bucket of a JSON file.

The file has "lives", one for each slice that is created: the states that its queued resource shows, one a look, and
the units that its workers show after a launch, one a look; the last of each stays. A unit "a+b" is that of two workers.
The state FORGOTTEN is that of a slice which somebody deletes at that moment. "failures" say what a call that contains
their key fails with, how often, and after how many that succeed.
"""

import json
import os
import sys
from pathlib import Path

LOADED = "ExecMainStatus={status} LoadState=loaded UnitFileState={enabled}"
UNITS = {
    "absent": "ActiveState=inactive ExecMainCode=0 ExecMainStatus=0 LoadState=not-found UnitFileState=",
    "booting": "ActiveState=inactive ExecMainCode=0 " + LOADED.format(status=0, enabled="enabled"),
    "going": "ActiveState=active ExecMainCode=0 " + LOADED.format(status=0, enabled="enabled"),
    "restarting": "ActiveState=activating ExecMainCode=1 " + LOADED.format(status=69, enabled="enabled"),
    "over": "ActiveState=inactive ExecMainCode=1 " + LOADED.format(status=0, enabled="enabled"),
    "stopped": "ActiveState=inactive ExecMainCode=1 " + LOADED.format(status=75, enabled="disabled"),
    "killed early": "ActiveState=inactive ExecMainCode=2 " + LOADED.format(status=15, enabled="disabled"),
    "refused": "ActiveState=failed ExecMainCode=1 " + LOADED.format(status=2, enabled="enabled"),
    "defect": "ActiveState=failed ExecMainCode=1 " + LOADED.format(status=1, enabled="enabled"),
    "signalled": "ActiveState=inactive ExecMainCode=2 " + LOADED.format(status=1, enabled="enabled"),
    "noise": "a shell of the worker greets",
    "lost": "ActiveState=failed ExecMainCode=1 " + LOADED.format(status=69, enabled="enabled"),
}


def take(script: list[str]) -> str:
    """The next entry; the last one stays."""
    return script.pop(0) if len(script) > 1 else script[0]


def answer(world: dict, line: str) -> str:
    """What gcloud prints; raises SystemExit with what it says on stderr where it fails."""
    life = world["life"]
    for needle, failure in world["failures"].items():
        if needle in line and failure["times"]:
            if failure["after"]:
                failure["after"] -= 1
                continue
            failure["times"] -= 1
            raise SystemExit(failure["message"])
    if "storage buckets describe" in line and not world["bucket"]:
        raise SystemExit("ERROR: (gcloud.storage.buckets.describe) gs://lab not found: 404.")
    if "storage ls" in line and not world["exported"]:
        raise SystemExit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    if " create " in line:
        if life:
            raise SystemExit("ERROR: ALREADY_EXISTS")
        world["life"] = {"launched": False, "queued": "queued-resources" in line, **world["lives"].pop(0)}
        return ""
    if "storage" in line:
        return "US-EAST5"
    if life is None or ("queued-resources" in line and not life.get("queued", True)):
        raise SystemExit(f"ERROR: (gcloud.{line}) NOT_FOUND: Resource 'projects/lab/nodes/x' was not found")
    if " delete " in line:
        world["life"] = None
    elif "queued-resources describe" in line:
        state = take(life["states"])
        world["life"] = None if state == "FORGOTTEN" else life
        return answer(world, line) if state == "FORGOTTEN" else state
    elif "tpu-vm describe" in line:
        return take(life["nodes"]) if "nodes" in life else "READY"
    elif "systemctl show" in line:
        units = (take(life["units"]) if life["launched"] else "absent").split("+")
        world["exported"] = world["exported"] or set(units) == {"over"}
        return "\n".join(UNITS[unit] for unit in units)
    elif "worker.sh launch" in line:
        life["launched"] = True
    elif "journalctl" in line:
        return "easyrm: --data.train=nowhere.jsonl: no such file"
    return ""


def main() -> None:
    """One call."""
    path, line = Path(os.environ["WORLD"]), " ".join(sys.argv[1:])
    world = json.loads(path.read_text())
    settings = {key: value for key, value in os.environ.items() if key.startswith("CLOUDSDK_")}
    agent = "SSH_AUTH_SOCK" in os.environ
    world["calls"].append({"argv": ["gcloud", *sys.argv[1:]], "settings": settings, "agent": agent})
    try:
        print(answer(world, line))
    finally:
        path.write_text(json.dumps(world))


if __name__ == "__main__":
    main()
