"""A disk that can be filled and freed while a process writes to it."""

import contextlib
import errno
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE, BLOCK = "64m", 2**12
LARGEST = 2**13  # bytes a file may have where the disk cannot be mounted and a limit stands in for it


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator["Mounted | Limited"]:
    """A small disk at `folder`; without the right to mount one, a limit on what a process may write."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield Mounted(folder) if mounted else Limited()
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Mounted:
    """A file takes what is free."""

    def __init__(self, folder: Path):
        self._file = folder / "filler"

    def fill(self, _: int, spare: int) -> None:
        """Leave `spare` bytes free."""
        with self._file.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(BLOCK))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            file.truncate(max(0, file.tell() - spare))

    def free(self, _: int) -> None:
        """Give it all back."""
        self._file.unlink(missing_ok=True)


class Limited:
    """No file of a process may grow beyond LARGEST."""

    def fill(self, pid: int, spare: int) -> None:
        """Begin with that; with `spare`, files may be larger, but the arrays of a checkpoint fit into none."""
        self._limit(pid, 8 * LARGEST if spare else LARGEST)

    def free(self, pid: int) -> None:
        """End it, where the process is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._limit(pid, resource.RLIM_INFINITY)

    def _limit(self, pid: int, most: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most if most > 0 else hard, hard))
