"""One reader for each format: JSON Lines, Parquet, the hub. Each goes on where a former attempt stopped."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from easyrm.data.retry import Position, Unreachable, reaching
from easyrm.errors import InputError, one_line

MAX_LINE_BYTES = 64 * 2**20
_BLOCK = 2**20  # bytes asked of a file at once
_ROWS = 256  # of Parquet, decoded at once
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError)  # of a value that Python has no form for


class Record(NamedTuple):
    """One line (JSON Lines) or row (Parquet, hub) of a source, counted from 1.

    `value` is what stood there, None where it could not be parsed: then `error` says why.
    """

    file: str
    line: int
    value: Any
    error: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def read_json_lines(path: str, done: Position) -> Iterator[Record]:
    """The records behind `done`; a blank line counts as a line but is no record.

    A line that is not JSON, or is longer than MAX_LINE_BYTES, is a Record with `error`. Raises InputError for a
    corrupted file and for one that changes meanwhile, Unreachable where the storage fails.
    """
    with contextlib.ExitStack() as stack:
        file = _open(path, done, stack)
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        try:
            if done.offset:
                file.seek(done.offset)
            while raw := file.readline(MAX_LINE_BYTES + 1):
                size = len(raw)
                while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES + 1)
                    size += len(raw)
                done.line, done.offset = done.line + 1, done.offset + size
                if size > MAX_LINE_BYTES:
                    yield Record(path, done.line, None, f"a line of {size} bytes; at most {MAX_LINE_BYTES} are read")
                elif raw.strip():
                    yield _parse(path, done.line, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _corrupted(path, done, f"line {done.line}", error) from error
    _check_version(path, done)
    if not path.endswith(".gz") and done.offset < done.version[0]:
        raise Unreachable from EOFError(f"it ended after {done.offset} of {done.version[0]} bytes")


def read_parquet(path: str, done: Position) -> Iterator[Record]:
    """The rows behind `done`; one with a value that cannot be decoded is a Record with `error`. Raises as above."""
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        file = _open(path, done, stack)
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)  # True would hold the whole file in memory
            groups = range(parquet.metadata.num_row_groups)
            ends = np.cumsum([parquet.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)
            first = int(np.searchsorted(ends, done.line, side="right"))
            row = int(ends[first - 1]) if first else 0
            for batch in parquet.iter_batches(batch_size=_ROWS, row_groups=groups[first:]):
                given = min(max(0, done.line - row), len(batch))
                row += len(batch)
                for value, error in _values(batch.slice(given)):
                    done.line += 1
                    yield Record(path, done.line, value, error)
        except (pyarrow.ArrowException, OSError) as error:
            raise _corrupted(path, done, f"row {done.line}", error) from error
    _check_version(path, done)


def read_hub(name: str, done: Position) -> Iterator[Record]:
    """The rows of `hf://dataset[:split]` behind `done`.

    Raises InputError for a data set or split that is not there and for damaged data, Unreachable where the hub fails.
    """
    import datasets

    dataset, _, split = name.removeprefix("hf://").partition(":")
    of_the_data = (*_UNREADABLE, EOFError, zlib.error, gzip.BadGzipFile, datasets.exceptions.DatasetsError)
    absent = (*of_the_data, FileNotFoundError)
    try:
        with reaching(*absent):
            rows = iter(datasets.load_dataset(dataset, split=split or "train", streaming=True).skip(done.line))
    except absent as error:
        raise InputError(f"data {name}: {one_line(error)}; write hf://dataset[:split]") from error
    end = object()
    while True:
        try:
            with reaching(*of_the_data):
                value = next(rows, end)
        except of_the_data as error:
            raise InputError(
                f"data {name}: corrupted after row {done.line} ({one_line(error)}); mend the data set"
            ) from error
        if value is end:
            return
        done.line += 1
        yield Record(name, done.line, value)


class _Storage(io.RawIOBase):
    """A file whose own failures are Unreachable, and so cannot be taken for damage found in what it holds."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with reaching():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reaching():
            self._file.seek(offset, whence)
            return self._file.tell()

    def tell(self) -> int:
        with reaching():
            return self._file.tell()


def _open(path: str, done: Position, stack: contextlib.ExitStack) -> io.BufferedReader:
    _check_version(path, done)
    with reaching():
        return io.BufferedReader(_Storage(stack.enter_context(epath.Path(path).open("rb"))), _BLOCK)


def _check_version(path: str, done: Position) -> None:
    """Notes size and time of the file at first, and later raises InputError if they are others."""
    with reaching():
        stat = epath.Path(path).stat()
    version = (stat.length, stat.mtime if stat.length else 0)  # a pipe has no length, and its time moves
    if done.version is None:
        done.version = version
    if version != done.version:
        raise InputError(
            f"data {path}: it changed while it was read ({done.version[0]} bytes, then {version[0]}; line {done.line} "
            "reached); start again once it is complete"
        )


def _corrupted(path: str, done: Position, place: str, error: Exception) -> InputError:
    _check_version(path, done)
    return InputError(f"data {path}: corrupted after {place} ({one_line(error)}); fetch the file again")


def _parse(path: str, line: int, raw: bytes) -> Record:
    try:
        return Record(path, line, json.loads(raw))
    except (ValueError, RecursionError) as error:
        return Record(path, line, None, f"not JSON: {error}")


def _values(batch: Any) -> list[tuple[Any, str | None]]:
    """(value, error) of each row of a pyarrow batch."""
    try:
        return [(value, None) for value in batch.to_pylist()]
    except _UNREADABLE as error:
        if len(batch) == 1:
            return [(None, f"not readable: {one_line(error)}")]
        return [row for i in range(len(batch)) for row in _values(batch.slice(i, 1))]
