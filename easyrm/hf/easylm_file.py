"""The files in which EasyLM keeps a model: where each array lies in them, and its values some rows at a time.

A stream holds one object [key, bytes] after another, the bytes being what flax.serialization makes of one array. Beyond
2 GiB of bytes, the AllenAI fork cuts them into entries named chunk_0, chunk_1 ...; beyond 1 GiB of values, flax itself
cuts the array. `flax_params` files are one such tree of arrays. Nothing is ever unpickled.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TypeVar

import ml_dtypes
import numpy as np
from etils import epath

from easyrm.errors import InputError
from easyrm.hf.msgpack_heads import AGAIN, Cursor, Span

KINDS = ("params", "trainstate_params", "trainstate", "flax_params")
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_BLOCK_BYTES = 8 * 2**20
_MAX_ARRAYS, _MAX_PARTS, _MAX_RANK, _MAX_SIZE = 2**16, 16, 8, 2**48
_NDARRAY = 1  # flax's ext type
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = re.compile(r"chunk_(\d{1,5})")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array whose values lie, in C order, in `spans` of the file; `dtype` as flax names it."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]


class EasyLMFile:
    """The arrays of a model in an EasyLM file, by key ("transformer/h/0/attention/wq/kernel"); heads alone are read.

    `skipped` are the number and bytes of the other entries of a train state: its optimizer's. Raises InputError, naming
    key, byte and what was expected, for a file that is cut off, damaged, or of another kind.
    """

    def __init__(self, checkpoint: str):
        """`checkpoint` is KIND::PATH as EasyLM's --load_checkpoint takes it; the path may be gs://..."""
        kind, found, path = checkpoint.partition("::")
        if kind not in KINDS or not found or not path:
            raise InputError(
                f"--checkpoint={checkpoint}: give KIND::PATH, as EasyLM's --load_checkpoint; KIND is {', '.join(KINDS)}"
            )
        self.path, self.skipped = epath.Path(path), (0, 0)
        if not self.path.exists() or self.path.is_dir():
            what = "a directory" if self.path.exists() else "no such file"
            raise InputError(f"--checkpoint={checkpoint}: {what}; give the file, such as DIR/streaming_params")
        try:
            with self.path.open("rb") as file:
                cursor = Cursor(self.path, file, [(0, self.path.stat().length)])
                arrays = self._read_flax(cursor) if kind == "flax_params" else self._read_stream(cursor, kind)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
        if not arrays:
            raise InputError(f"{path}: holds no array; {AGAIN}")
        self.arrays: dict[str, StoredArray] = {}
        for key, array in arrays.items():
            name = re.sub("^(params/)+", "", key)
            if name in self.arrays:
                raise InputError(f"{path}: {name} is there twice, as {key} too; {AGAIN}")
            self.arrays[name] = array

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, whole rows in the stored dtype) of an array with one row at least, a few MB at a time."""
        array = self.arrays[name]
        dtype, row_shape = DTYPES[array.dtype], array.shape[1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)
        step = max(1, _BLOCK_BYTES // row_bytes)
        with self.path.open("rb") as file:
            cursor = Cursor(self.path, file, list(array.spans), name)
            for first in range(0, array.shape[0], step):
                count = min(step, array.shape[0] - first)
                data = cursor.take(count * row_bytes, "values")
                yield first, np.frombuffer(data, dtype).reshape(count, *row_shape)

    def byte_of(self, name: str, element: int) -> int:
        """Where in the file an element of an array begins, counted in C order."""
        array = self.arrays[name]
        at = element * DTYPES[array.dtype].itemsize
        for first, size in array.spans:
            if at < size:
                return first + at
            at -= size
        raise IndexError(f"{name} has no element {element}")

    def _read_stream(self, cursor: Cursor, kind: str) -> dict[str, StoredArray]:
        arrays: dict[str, StoredArray] = {}
        pieces = _read_entries(cursor)
        total = {name: sum(size for _, size in spans) for name, spans in pieces.items()}
        model = list(pieces)
        if kind != "params":
            model = [name for name in pieces if name.startswith("params/")]
            others = set(pieces) - set(model)
            self.skipped = len(others), sum(total[name] for name in others)
            if not model:
                raise InputError(f"{self.path}: none of its keys begins with params; is it params::{self.path}?")
        elif any(name.startswith("opt_state/") for name in pieces):
            raise InputError(f"{self.path}: holds a train state; give trainstate_params::{self.path}")
        for name in model:
            inner = cursor.within(pieces[name])
            _read_tree(inner, (name,), arrays)
            inner.end("its array")
        return arrays

    def _read_flax(self, cursor: Cursor) -> dict[str, StoredArray]:
        arrays: dict[str, StoredArray] = {}
        size = cursor.expect("map", "a map, as flax_params files are")
        for _ in range(size):
            _read_tree(cursor, (cursor.text("a key"),), arrays)
        cursor.end("the file")
        return arrays


def _read_entries(cursor: Cursor) -> dict[str, list[Span]]:
    """Where the bytes of each key of a stream lie, those of the fork's chunks joined."""
    pieces: dict[str, dict[int, list[Span]]] = defaultdict(dict)
    for number in range(_MAX_ARRAYS):
        if not cursor.left:
            return {name: _joined(cursor, name, parts) for name, parts in pieces.items()}
        cursor.name = f"entry {number}"
        start = cursor.offset
        cursor.expect("array", "an array of key and value", 2, 2)
        count = cursor.expect("array", "an array of the parts of a key", 1, _MAX_PARTS)
        parts = [cursor.text("a part of a key") for _ in range(count)]
        cursor.name = "/".join(parts)
        chunk = _CHUNK.fullmatch(parts[-1])
        name = "/".join(parts[:-1] if chunk else parts)
        place = int(chunk[1]) if chunk else -1
        if place in pieces[name] or (pieces[name] and (place == -1 or -1 in pieces[name])):
            cursor.refuse("each key once", "it is there twice", start)
        pieces[name][place] = cursor.skip(cursor.expect("bin", "bytes"), "bytes")
    cursor.refuse(f"at most {_MAX_ARRAYS} entries", "more")


def _joined(cursor: Cursor, name: str, parts: dict[int, list[Span]]) -> list[Span]:
    if -1 not in parts and set(parts) != set(range(len(parts))):
        missing = next(i for i in range(len(parts)) if i not in parts)
        cursor.name = name
        cursor.refuse(f"chunk_0 to chunk_{max(parts)}", f"no chunk_{missing}")
    return [span for place in sorted(parts) for span in parts[place]]


def _read_tree(cursor: Cursor, parts: tuple[str, ...], arrays: dict[str, StoredArray]) -> None:
    """Adds the arrays of a flax tree, or the array that it is, by key."""
    cursor.name = name = "/".join(parts)
    start = cursor.offset
    head = cursor.head("a map or an array")
    if head.kind == "ext":
        found = _read_ndarray(cursor, head.size)
    elif head.kind == "map" and len(parts) < _MAX_PARTS:
        for i in range(head.size):
            part = cursor.text("a part of a key")
            if i == 0 and part == _CHUNKED:
                found = _read_chunked(cursor, head.size)
                break
            _read_tree(cursor, (*parts, part), arrays)
            cursor.name = name
        else:
            return
    else:
        cursor.refuse("a map or an array of flax", head.kind, start)
    if name in arrays or len(arrays) == _MAX_ARRAYS:
        cursor.refuse(f"each key once, at most {_MAX_ARRAYS}", "it is there twice, or more of them", start)
    arrays[name] = found


def _read_ndarray(cursor: Cursor, size: int) -> StoredArray:
    """What follows the head of an ext object: an ext type, then [shape, dtype, values]."""
    at = cursor.offset
    code = cursor.take(1, "an ext type")[0]
    if code != _NDARRAY:
        cursor.refuse(f"ext type {_NDARRAY}, an array", f"ext type {code}", at)
    inner = cursor.within(cursor.skip(size, "an array"))
    inner.expect("array", "shape, dtype and values", 3, 3)
    rank = inner.expect("array", "a shape", 0, _MAX_RANK)
    shape = tuple(inner.expect("int", "a size", 0, _MAX_SIZE) for _ in range(rank))
    dtype = inner.text("a dtype")
    at = inner.offset
    length = inner.expect("bin", "values")
    if dtype in DTYPES and length != DTYPES[dtype].itemsize * math.prod(shape):
        bytes_of_shape = DTYPES[dtype].itemsize * math.prod(shape)
        inner.refuse(f"{bytes_of_shape} bytes for {dtype}{list(shape)}", str(length), at)
    spans = inner.skip(length, "values")
    inner.end("the array")
    return StoredArray(dtype, shape, tuple(spans))


def _read_chunked(cursor: Cursor, size: int) -> StoredArray:
    """What follows the marker of {marker: true, "shape": {"0": size, ...}, "chunks": {"0": array, ...}}."""
    at = cursor.offset
    if size != 3 or cursor.head("true").kind != "true":
        cursor.refuse("marker, shape and chunks of a chunked array", f"a map of {size}", at)
    _expect_key(cursor, "shape")
    rank = cursor.expect("map", "a shape", 1, _MAX_RANK)
    shape = tuple(_numbered(cursor, i, lambda: cursor.expect("int", "a size", 0, _MAX_SIZE)) for i in range(rank))
    _expect_key(cursor, "chunks")
    count = cursor.expect("map", "chunks", 1, _MAX_ARRAYS)
    chunks = [
        _numbered(cursor, i, lambda: _read_ndarray(cursor, cursor.expect("ext", "a chunk"))) for i in range(count)
    ]
    held, dtypes = sum(math.prod(chunk.shape) for chunk in chunks), {chunk.dtype for chunk in chunks}
    if len(dtypes) > 1 or held != math.prod(shape):
        cursor.refuse(f"{math.prod(shape)} elements of one dtype", f"{held} of {', '.join(sorted(dtypes))}", at)
    return StoredArray(chunks[0].dtype, shape, tuple(span for chunk in chunks for span in chunk.spans))


def _numbered(cursor: Cursor, number: int, read: Callable[[], _T]) -> _T:
    _expect_key(cursor, str(number))
    return read()


def _expect_key(cursor: Cursor, key: str) -> None:
    at = cursor.offset
    if (found := cursor.text(f"the key {key!r}")) != key:
        cursor.refuse(f"the key {key!r}", repr(found), at)
