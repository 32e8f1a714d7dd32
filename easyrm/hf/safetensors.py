"""A reader of safetensors that holds one piece of one tensor at a time.

Files are read by plain reads: mapped pages would count as this process's memory and exist only for local files, while
these work on `gs://` as well. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a
JSON header, then the tensors' bytes in C order).
"""

import dataclasses
import math
from collections.abc import Container, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from easyrm.errors import InputError
from easyrm.strict_json import parse_object, read_object

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
CHUNK_BYTES = 8 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_MAX_RANK = 8
_AGAIN = "get the file again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: its file, dtype as the header names it, shape, and first byte within the file."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """The tensors of a model directory, single or sharded: `entries` by name, and their rows by `rows`.

    Opening reads the headers alone. Raises InputError, naming the file, for a directory without safetensors, an index
    that names what is not there or not in the directory, a tensor in two files, and a file that is cut short or is no
    safetensors file.
    """

    def __init__(self, directory: epath.PathLike):
        directory = epath.Path(directory)
        self.entries: dict[str, Entry] = {}
        for file, promised in _weight_files(directory).items():
            entries = read_header(file)
            if absent := sorted(set(promised) - set(entries)):
                raise InputError(f"{file}: does not hold {', '.join(absent)}, which its index promises; {_AGAIN}")
            if twice := sorted(set(entries) & set(self.entries)):
                raise InputError(
                    f"{file}: holds {', '.join(twice)}, as another file does; remove what is not to be read"
                )
            self.entries.update(entries)

    def rows(self, name: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, array of whole rows in the stored dtype) over rows start..stop, CHUNK_BYTES at a time."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        row_shape = entry.shape[1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)
        step = max(1, CHUNK_BYTES // row_bytes)
        with entry.file.open("rb") as file:
            file.seek(entry.start + start * row_bytes)
            for first in range(start, stop, step):
                count = min(step, stop - first)
                data = file.read(count * row_bytes)
                if len(data) != count * row_bytes:
                    raise InputError(f"{entry.file}: ends within {name}; {_AGAIN}")
                yield first, np.frombuffer(data, dtype).reshape(count, *row_shape)


def _weight_files(directory: epath.Path) -> dict[epath.Path, list[str]]:
    """Each safetensors file of a model directory, with the tensor names that an index promises of it."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return {single: []}
    if not index.exists():
        raise InputError(
            f"{directory}: no model.safetensors and no index of one; a checkpoint in *.bin is to be converted first, "
            f"with transformers: model.save_pretrained(directory, safe_serialization=True)"
        )
    try:
        names = read_object(index)["weight_map"]
        files = list(names.values())
    except (KeyError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors ({error!r}); {_AGAIN}") from error
    for file in files:
        if not _is_file_name(file):
            raise InputError(f"{index}: weight_map names {file!r}, which is not a file beside it; {_AGAIN}")
    promised = {directory / file: [] for file in sorted(set(files))}
    if missing := [file.name for file in promised if not file.exists()]:
        raise InputError(f"{index}: names {', '.join(missing)}, which is not there; get the missing file")
    for name, file in names.items():
        promised[directory / file].append(name)
    return promised


def _is_file_name(name: Any) -> bool:
    """Whether an index's word for a file is a plain name, so that it cannot lead out of the directory."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")


def read_header(file: epath.Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by name, after checking the header against the file's size.

    As the format demands, the tensors fill the rest of the file: none overlap and nothing lies between them.
    """
    try:
        size = file.stat().length
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise InputError(f"{file}: a header of {length} bytes does not fit a file of {size} bytes; {_AGAIN}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}); check the file") from error
    header = parse_object(text, f"{file}: its header")
    header.pop("__metadata__", None)
    if broken := [name for name, info in header.items() if not (name.isprintable() and _is_sound(info))]:
        raise InputError(f"{file}: the header contradicts itself on {', '.join(map(repr, broken))}; {_AGAIN}")
    end = 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        if start != end:
            raise InputError(f"{file}: {name} starts at byte {start} of the data, where {end} is next; {_AGAIN}")
        end = stop
    first = 8 + length
    if first + end > size:
        raise InputError(f"{file}: cut short, {size} bytes where its header promises {first + end}; {_AGAIN}")
    if first + end < size:
        raise InputError(f"{file}: {size} bytes, but its header tells of {first + end}; {_AGAIN}")
    return {
        name: Entry(file, info["dtype"], tuple(info["shape"]), first + info["data_offsets"][0])
        for name, info in header.items()
    }


def _is_sound(info: Any) -> bool:
    """Whether a header's span is as long as its shape says; a dtype that we do not read may have any length."""
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str):
        return False
    shape, span = info.get("shape"), info.get("data_offsets")
    if not _are_sizes(shape, range(_MAX_RANK + 1)) or not _are_sizes(span, (2,)) or span[0] > span[1]:
        return False
    dtype = DTYPES.get(info["dtype"])
    return dtype is None or span[1] - span[0] == dtype.itemsize * math.prod(shape)


def _are_sizes(value: Any, counts: Container[int]) -> bool:
    return isinstance(value, list) and len(value) in counts and all(type(i) is int and 0 <= i < 2**63 for i in value)
