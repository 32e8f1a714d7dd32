"""Whether a directory can be written and read, how fast, and whether all hosts see the same one."""

import contextlib
import os
import threading
import time
import uuid

from etils import epath

from easyrm.health.finding import FAIL, OK, WARN, Finding
from easyrm.health.processes import why

SIZE = 64 * 2**20  # bytes written and read, of a bucket half of them
_CHUNK = 4 * 2**20
_SECONDS = 4.0  # after which a slow storage has shown how slow it is, in either direction
_SLOW = 20.0  # MB/s: a checkpoint of an 8B model, 96 GB, would take more than an hour on one host
_SEEN_SECONDS = 3.0  # in which a file made by another host has to appear


class Probes:
    """The files that checks have written and not yet removed; `remove` takes all of them away, whatever happens."""

    def __init__(self):
        self._lock, self._files, self._closed = threading.Lock(), set(), False

    @contextlib.contextmanager
    def file(self, folder: epath.Path):
        """A path in `folder` with a name of its own, whose file is gone afterwards; a local one is there already."""
        path = folder / f".easyrm-doctor-{uuid.uuid4().hex}"
        with self._lock:
            if self._closed:
                raise InterruptedError("the doctor was stopped")
            self._files.add(path)
            if "://" not in str(path):
                path.touch()
        try:
            yield path
        finally:
            with contextlib.suppress(Exception):  # each storage client has error types of its own
                path.unlink(missing_ok=True)
            with self._lock:
                self._files.discard(path)

    def remove(self) -> None:
        """Remove what is left, within seconds, and let nothing new begin."""
        held = self._lock.acquire(timeout=1)  # not for as long as a storage that hangs
        self._closed, left = True, list(self._files)
        if held:
            self._lock.release()

        def unlink() -> None:
            for path in left:
                with contextlib.suppress(Exception):
                    path.unlink(missing_ok=True)

        thread = threading.Thread(target=unlink, daemon=True)
        thread.start()
        thread.join(3)


def standing(directory: str) -> epath.Path:
    """The directory, or where it is not there the nearest one above it that is; a bucket's are always there."""
    path = epath.Path(directory)
    if "://" in directory:
        return path
    path = epath.Path(os.path.abspath(path))
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def look(flag: str, directory: str, probes: Probes, size: int = SIZE) -> Finding:
    """Whether `directory`, the value of `flag`, takes a file and gives it back, with MB/s of both."""
    check = "cache" if flag == "compilation_cache" else flag
    folder, local = standing(directory), "://" not in directory
    way_out = f"give --{flag} a directory (local or gs://) that this user may write"
    if local and not folder.is_dir():
        return Finding(check, FAIL, f"{directory}: {folder} is a file, not a directory", way_out)
    made = "" if not local or os.path.isdir(directory) else "; it is not there yet and will be made"
    try:
        with probes.file(folder) as path:
            written, writing = _write(path, size if local else size // 2)
            read, reading = _read(path)
            path.unlink()  # as the trainer does with checkpoints
    except ImportError as error:
        return Finding(check, FAIL, f"{directory}: {error}", "pip install -e '.[gcs]'")
    except Exception as error:  # each storage client has error types of its own
        reason = why(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return Finding(check, FAIL, f"{directory}: {folder} cannot be written ({reason})", way_out)
    if read != written:
        return Finding(check, FAIL, f"{directory}: of {written} bytes written, {read} were read back", way_out)
    speeds = {"write": [written / writing / 1e6], "read": [read / reading / 1e6]}
    text = f"{directory}: writes {{write}} MB/s, reads {{read}} MB/s{made}"
    if min(speeds["write"] + speeds["read"]) < _SLOW:
        return Finding(
            check, WARN, text, f"under {_SLOW:g} MB/s checkpoints take long: choose a faster storage", speeds
        )
    return Finding(check, OK, text, figures=speeds)


def sees(path: str) -> bool:
    """Whether a file that another host has just made is here, too."""
    until = time.monotonic() + _SEEN_SECONDS
    while not (there := os.path.exists(path)) and time.monotonic() < until:
        time.sleep(0.2)
    return there


def _write(path: epath.Path, size: int) -> tuple[int, float]:
    block, began, written = os.urandom(_CHUNK), time.perf_counter(), 0
    # A local file that was removed meanwhile must not come back.
    with path.open("wb") if "://" in str(path) else open(path, "r+b") as file:
        while written < size and time.perf_counter() - began < _SECONDS:
            data = block[: size - written]
            file.write(data)
            written += len(data)
        file.flush()
        if "://" not in str(path):
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else memory is read, not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written, time.perf_counter() - began


def _read(path: epath.Path) -> tuple[int, float]:
    began, read = time.perf_counter(), 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            read += len(data)
    return read, time.perf_counter() - began
