"""Records from files, globs, directories, buckets and the hub, one at a time."""

import contextlib
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from easyrm.errors import InputError

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_GLOB_CHARACTERS = set("*?[")


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


def resolve(spec: str) -> list[str]:
    """The files and hub names that a comma-separated list of files, globs, directories and hub names stands for.

    Directories and globs come in sorted order. Raises InputError for an empty list, and for a part that names nothing.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise InputError("no data given; use --data.train=FILE, a glob, a directory, gs://... or hf://dataset[:split]")
    return [path for part in parts for path in _resolve_one(part)]


def read(spec: str) -> Iterator[Record]:
    """Streams the records of every file in `spec`; a line that is not JSON is a Record with `error` set.

    Missing files raise InputError here, before anything is read; a corrupted file does when it is reached.
    """
    paths = resolve(spec)
    return (record for path in paths for record in read_one(path))


def read_one(path: str) -> Iterator[Record]:
    """Streams the records of one file or hub name, as `resolve` gives them."""
    if path.startswith("hf://"):
        return _read_hub(path)
    return _read_parquet(path) if path.endswith(".parquet") else _read_json_lines(path)


def _resolve_one(part: str) -> list[str]:
    if part.startswith("hf://"):
        return [part]
    if _GLOB_CHARACTERS & set(part):
        found = _glob(part)
        if not found:
            raise InputError(f"data {part}: the glob matches no file")
        return found
    path = epath.Path(part)
    if path.is_dir():
        found = sorted(str(child) for child in path.iterdir() if child.name.endswith(_SUFFIXES))
        if not found:
            raise InputError(f"data {part}: the directory holds no file ending in {', '.join(_SUFFIXES)}")
        return found
    if not path.exists():
        raise InputError(f"data {part}: no such file or directory; check the path")
    return [part]


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if "**" in pattern:
        raise InputError(f"data {pattern}: ** is for local files; name the directories, or use *")
    # Buckets are listed from a directory: what stands before the first wildcard.
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _GLOB_CHARACTERS & set(part))
    found = epath.Path("/".join(parts[:first])).glob("/".join(parts[first:]))
    return sorted(str(path) for path in found if not path.is_dir())


def _read_json_lines(path: str) -> Iterator[Record]:
    line = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(path).open("rb"))
        if path.endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        try:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield _parse(path, line, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"data {path}: corrupted after line {line} ({error}); fetch the file again") from error


def _parse(path: str, line: int, raw: bytes) -> Record:
    try:
        return Record(path, line, json.loads(raw))
    except (ValueError, RecursionError) as error:
        return Record(path, line, None, f"not JSON: {error}")


def _read_parquet(path: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    with epath.Path(path).open("rb") as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row, value in enumerate(batch.to_pylist(), row + 1):  # noqa: B020
                    yield Record(path, row, value)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"data {path}: corrupted after row {row} ({reason}); fetch the file again") from error


def _read_hub(name: str) -> Iterator[Record]:
    import datasets

    dataset, _, split = name.removeprefix("hf://").partition(":")
    try:
        rows = datasets.load_dataset(dataset, split=split or "train", streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"data {name}: {reason}; write hf://dataset[:split]") from error
    for row, value in enumerate(rows, 1):
        yield Record(name, row, value)
