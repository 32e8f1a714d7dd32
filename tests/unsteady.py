"""A storage that fails now and then."""

import io
import itertools
from pathlib import Path

from etils import epath

from easyrm.data import retry


class Unsteady(io.RawIOBase):
    """A local file read `block` bytes at a time whose k-th read, for each k in `fail_at`, raises `error`."""

    def __init__(self, path, reads, fail_at, error, block):
        self._file = path.open("rb")
        self._reads, self._fail_at, self._error, self._block = reads, fail_at, error, block

    def read(self, size=-1):
        if next(self._reads) in self._fail_at:
            raise self._error
        return self._file.read(min(size, self._block))

    def seek(self, offset, whence=io.SEEK_SET):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()

    def close(self):
        self._file.close()
        super().close()


def unsteady(monkeypatch, *, fail_at, error=None, block=2**20) -> list[float]:
    """Has every file opened by the readers be Unsteady, all counting together; returns the pauses made, in seconds."""
    pauses, reads = [], itertools.count()
    error = TimeoutError("late") if error is None else error
    monkeypatch.setattr(retry, "wait", pauses.append)
    monkeypatch.setattr(
        type(epath.Path()), "open", lambda path, mode: Unsteady(Path(path), reads, fail_at, error, block)
    )
    return pauses
