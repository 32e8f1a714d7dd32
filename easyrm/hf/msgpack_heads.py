"""MessagePack read by its heads: what lies where in a file, with the values themselves skipped.

The msgpack library holds a whole value in memory to step over it; a checkpoint's values are gigabytes. Format:
https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import dataclasses
from typing import Any, NoReturn

from etils import epath

from easyrm.errors import InputError

Span = tuple[int, int]  # first byte in the file, number of bytes
AGAIN = "get the file again"

# First byte: (kind, bytes of the number that follows). Of str, bin, array, map and ext the number is a length.
_HEADS = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCA + i: ("float", 4 << i) for i in range(2)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD0 + i: ("negative int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_NAMED = {0xC0: "nil", 0xC1: "a byte that MessagePack does not use", 0xC2: "false", 0xC3: "true"}


@dataclasses.dataclass(frozen=True)
class Head:
    """`kind` of the next object and its `size`: a length in bytes, items or pairs, the value of an int."""

    kind: str
    size: int = 0


class Cursor:
    """A place within spans of an open file that are read as one; it only moves forward.

    `name` says in messages what is read. Every method raises InputError, naming file, name, byte and what was expected,
    where the bytes say otherwise, lead beyond the spans or cannot be read.
    """

    def __init__(self, path: epath.Path, file: Any, spans: list[Span], name: str = ""):
        self.name = name
        self._path, self._file, self._spans = path, file, spans
        self._at = 0  # within the current span, the first
        self.left = sum(size for _, size in spans)

    @property
    def offset(self) -> int:
        """The place in the file."""
        return self._spans[0][0] + self._at if self._spans else 0

    def within(self, spans: list[Span]) -> "Cursor":
        """A cursor over other spans of the same file."""
        return Cursor(self._path, self._file, spans, self.name)

    def refuse(self, expected: str, found: str, at: int | None = None) -> NoReturn:
        """Raises the InputError for what was found at a byte, the present one by default."""
        name = f"{self.name} at " if self.name else ""
        at = self.offset if at is None else at
        raise InputError(f"{self._path}: {name}byte {at}: expected {expected}, found {found}; {AGAIN}")

    def skip(self, count: int, what: str) -> list[Span]:
        """Steps over `count` bytes and returns where in the file they lie."""
        if count > self.left:
            self.refuse(f"{count} bytes of {what}", f"{self.left}: cut off, or damaged")
        self.left -= count
        passed = []
        while count:
            first, size = self._spans[0]
            step = min(count, size - self._at)
            if step:
                passed.append((first + self._at, step))
            self._at, count = self._at + step, count - step
            if self._at == size and len(self._spans) > 1:
                self._spans, self._at = self._spans[1:], 0
        return passed

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        return b"".join(read_span(self._path, self._file, span, self.name) for span in self.skip(count, what))

    def head(self, what: str) -> Head:
        """The head of the next object."""
        first = self.take(1, what)[0]
        if first < 0x80:
            return Head("int", first)
        if first < 0xC0:
            return Head("map", first & 15) if first < 0x90 else _short(first)
        if first >= 0xE0:
            return Head("negative int")
        if first in _NAMED:
            return Head(_NAMED[first])
        if 0xD4 <= first <= 0xD8:
            return Head("ext", 1 << (first - 0xD4))
        kind, width = _HEADS[first]
        return Head(kind, int.from_bytes(self.take(width, f"the length of {what}"), "big"))

    def expect(self, kind: str, what: str, least: int = 0, most: int = 2**63) -> int:
        """The size of the next object, which is to be of this kind and size."""
        at = self.offset
        head = self.head(what)
        if head.kind != kind or not least <= head.size <= most:
            self.refuse(what, f"{head.kind} of {head.size}" if head.kind == kind else head.kind, at)
        return head.size

    def text(self, what: str, most: int = 256) -> str:
        """The next object, a short printable string."""
        at = self.offset
        raw = self.take(self.expect("str", what, most=most), what)
        text = raw.decode("utf-8", "replace")
        if not text.isprintable() or "\ufffd" in text:
            self.refuse(what, repr(raw[:40]), at)
        return text

    def end(self, what: str) -> None:
        """Raises unless the spans are read up."""
        if self.left:
            self.refuse(f"the end of {what}", f"{self.left} more bytes")


def _short(first: int) -> Head:
    return Head("array", first & 15) if first < 0xA0 else Head("str", first & 31)


def read_span(path: epath.Path, file: Any, span: Span, name: str) -> bytes:
    """The bytes of one span. Raises InputError where they cannot be read."""
    first, size = span
    try:
        file.seek(first)
        data = file.read(size)
    except OSError as error:
        raise InputError(f"{path}: {name}: cannot be read ({error.strerror or error}); check the file") from error
    if len(data) != size:
        raise InputError(f"{path}: {name}: {len(data)} bytes at byte {first} where {size} were; {AGAIN}")
    return data
