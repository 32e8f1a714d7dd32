"""Records from files, globs, directories, buckets and the hub, one at a time."""

import glob
import os
from collections.abc import Callable, Iterator

from etils import epath

from easyrm.data.readers import Record, read_hub, read_json_lines, read_parquet
from easyrm.data.retry import reaching, steadily
from easyrm.errors import InputError

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_GLOB_CHARACTERS = set("*?[")


def resolve(spec: str, on_retry: Callable[[str], None] = print) -> list[str]:
    """The files and hub names that a comma-separated list of files, globs, directories and hub names stands for.

    Directories and globs come in sorted order. Raises InputError for an empty list, for a part that names nothing, and
    for a storage that does not answer; `on_retry` hears of each further try.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise InputError("no data given; use --data.train=FILE, a glob, a directory, gs://... or hf://dataset[:split]")
    return [path for part in parts for path in steadily(part, lambda _, part=part: _resolve_one(part), on_retry)]


def read(spec: str, on_retry: Callable[[str], None] = print) -> Iterator[Record]:
    """Streams the records of every file in `spec`; a line that is not JSON is a Record with `error` set.

    Missing files raise InputError here, before anything is read; a corrupted file does when it is reached.
    """
    paths = resolve(spec, on_retry)
    return (record for path in paths for record in read_one(path, on_retry))


def read_one(path: str, on_retry: Callable[[str], None] = print) -> Iterator[Record]:
    """Streams the records of one file or hub name, as `resolve` gives them; blank lines are none.

    Where the storage fails, reading goes on at the next record after a while, and `on_retry` hears of it. Raises
    InputError for a file that is corrupted, vanishes, changes meanwhile or cannot be reached, with the line reached.
    """
    reader = read_parquet if path.endswith(".parquet") else read_json_lines
    if path.startswith("hf://"):
        reader = read_hub
    return steadily(path, lambda done: reader(path, done), on_retry)


def _resolve_one(part: str) -> list[str]:
    with reaching():
        return _list(part)


def _list(part: str) -> list[str]:
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
