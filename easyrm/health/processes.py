"""Which process holds a file or a port, from /proc."""

import contextlib
import glob
import os
import re
import socket
from collections.abc import Container

from easyrm.redact import redact

_SHOWN = 60  # characters of a command


def holders(paths: Container[str], proc: str = "/proc") -> list[str]:
    """ "pid 123 (command)" of each other process that has one of `paths` open, as far as this user may see."""
    found = []
    for folder in sorted(glob.glob(f"{proc}/[0-9]*/fd")):
        pid = folder.split("/")[-2]
        if pid != str(os.getpid()) and any(target in paths for target in _open_files(folder)):
            found.append(described(int(pid), proc))
    return found


def listeners(port: int, proc: str = "/proc") -> list[str]:
    """ "pid 123 (command)" of each other process that listens on a TCP port."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"{proc}/net/{table}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: LISTEN
                    sockets.add(f"socket:[{fields[9]}]")
    return holders(sockets, proc) if sockets else []


def described(pid: int, proc: str = "/proc") -> str:
    """A process by its id and the beginning of its command."""
    with contextlib.suppress(OSError), open(f"{proc}/{pid}/cmdline", "rb") as file:
        words = redact(file.read().replace(b"\0", b" ").decode(errors="replace").strip())
        return f"pid {pid} ({words[:_SHOWN]}{'...' * (len(words) > _SHOWN)})"
    return f"pid {pid}"


def why(error: OSError) -> str:
    """What went wrong with a connection or a file, in the system's words."""
    if isinstance(error, socket.gaierror):
        return f"name not found: {error.strerror}"
    if isinstance(error, TimeoutError):
        return "timed out"
    return error.strerror or re.sub(r"^\[Errno \S+\] ", "", str(error)) or type(error).__name__


def _open_files(folder: str) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for number in os.listdir(folder):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"{folder}/{number}"))
    return found
