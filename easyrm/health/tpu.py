"""Whether a TPU of this host is free: the processes that have it open, and libtpu's lock file."""

import fcntl
import glob
import importlib.util
import os
import struct
from collections.abc import Sequence

from easyrm.distributed import on_cpu, tpu_chips
from easyrm.health.finding import FAIL, OK, SKIPPED, Finding
from easyrm.health.processes import described, holders

LOCK = "/tmp/libtpu_lockfile"
# struct flock of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


def accelerators() -> list[str]:
    """The TPU and GPU devices of this host; none where JAX is told to compute on the processor."""
    return [] if on_cpu() else tpu_chips() + sorted(glob.glob("/dev/nvidia[0-9]*"))


def look(devices: Sequence[str], lock: str = LOCK, proc: str = "/proc") -> Finding:
    """Whether the TPU `devices` are free for this process."""
    if not devices:
        return Finding("tpu", SKIPPED, "not applicable: no TPU on this host")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return Finding("tpu", FAIL, f"{devices[0]} is a TPU, but libtpu is not installed", "pip install -e '.[tpu]'")
    if held := holders(set(devices), proc):
        return Finding(
            "tpu", FAIL, f"in use by {', '.join(held)}", "wait for that process, or end it: kill PID, or sudo kill PID"
        )
    if not os.path.exists(lock):
        return Finding("tpu", OK, f"{len(devices)} free ({devices[0]}, ...), no lock file")
    if not os.access(lock, os.R_OK | os.W_OK):
        text = f"{lock} belongs to user id {os.stat(lock).st_uid}, and libtpu cannot lock it"
        return Finding("tpu", FAIL, text, f"sudo rm {lock}")
    if (holder := _locked_by(lock)) is not None:
        # Of a process of another container the kernel does not say which it is.
        who = described(holder, proc) if holder > 0 else "a process of another container"
        return Finding("tpu", FAIL, f"{lock} is locked by {who}", "wait for that process, or end it: sudo kill PID")
    return Finding("tpu", OK, f"{len(devices)} free ({devices[0]}, ...); {lock} is there, but nobody has locked it")


def _locked_by(lock: str) -> int | None:
    """The process that has `lock` locked as libtpu does (lockf), None where none has. The lock is not taken."""
    with open(lock, "rb") as file:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid
