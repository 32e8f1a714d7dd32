"""A reader of safetensors that holds one piece of one tensor at a time.

Files are read by plain reads: mapped pages would count as this process's memory and exist only for local files, while
these work on `gs://` as well. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a
JSON header, then the tensors' bytes in C order).
"""

import dataclasses
import json
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from etils import epath

from easyrm.errors import InputError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
CHUNK_BYTES = 8 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
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
    that names what is not there, and a file that is cut short or is no safetensors file.
    """

    def __init__(self, directory: epath.PathLike):
        directory = epath.Path(directory)
        self.entries: dict[str, Entry] = {}
        for file, promised in _weight_files(directory).items():
            entries = read_header(file)
            if absent := sorted(set(promised) - set(entries)):
                raise InputError(f"{file}: does not hold {', '.join(absent)}, which its index promises; {_AGAIN}")
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
        names = dict(json.loads(index.read_text())["weight_map"])
        promised = {directory / file: [] for file in sorted(set(names.values()))}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: not an index of safetensors ({error!r}); {_AGAIN}") from error
    if missing := [file.name for file in promised if not file.exists()]:
        raise InputError(f"{index}: names {', '.join(missing)}, which is not there; get the missing file")
    for name, file in names.items():
        promised[directory / file].append(name)
    return promised


def read_header(file: epath.Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by name, after checking the header against the file's size."""
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise InputError(f"{file}: a header of {length} bytes does not fit a file of {size} bytes; {_AGAIN}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = {name: (info["dtype"], tuple(info["shape"]), *info["data_offsets"]) for name, info in header.items()}
        broken = [name for name, span in spans.items() if not _is_sound(*span)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: its header is not a safetensors header ({error!r}); {_AGAIN}") from error
    if broken:
        raise InputError(f"{file}: the header contradicts itself on {', '.join(broken)}; {_AGAIN}")
    end = 8 + length + max((span[3] for span in spans.values()), default=0)
    if end > size:
        raise InputError(f"{file}: cut short, {size} bytes where its header promises {end}; {_AGAIN}")
    return {name: Entry(file, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in spans.items()}


def _is_sound(dtype: str, shape: tuple[int, ...], start: int, stop: int) -> bool:
    """Whether a header's span is as long as its shape says; a dtype that we do not read may have any length."""
    if not 0 <= start <= stop or any(not isinstance(size, int) or size < 0 for size in shape):
        return False
    return dtype not in DTYPES or stop - start == DTYPES[dtype].itemsize * math.prod(shape)
