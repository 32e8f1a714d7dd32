"""What a compiled XLA program sends between chips, read from its text.

A loop's body counts as often as the loop's condition says. XLA often turns the gather of a weight and its product into
a loop of collective-permutes, so that they overlap: those bytes appear as collective-permute.
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_INTEGER = re.compile(r"[su](?:8|16|32|64)\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass
class Traffic:
    """`sent` and `calls`: bytes that one chip sends in a step, and collectives it takes part in, both by kind.

    `unknown_loops` counts loops that communicate and whose trip count the text does not tell; they count once.
    """

    sent: dict[str, float]
    calls: dict[str, int]
    unknown_loops: int

    @property
    def total(self) -> float:
        """Bytes that one chip sends in a step."""
        return sum(self.sent.values())


def read_traffic(text: str) -> Traffic:
    """The traffic of a program given as `compiled.as_text()`; bytes are those of a ring, the least that is sent."""
    bodies, entry = _computations(text)
    devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text[:10000])) else 1
    traffic = Traffic(dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0), 0)
    seen = set()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if not instruction:
                continue
            shape, operation, rest = instruction.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS and not _again(rest, seen):
                kind, sent = _sent(kind, operation, shape, rest, name, devices)
                traffic.sent[kind] += sent * times
                traffic.calls[kind] += times
            trips = _trips(rest, bodies) if operation == "while" else 1
            before = traffic.total
            for called in _called(operation, rest):
                visit(called, times * (trips or 1))
            traffic.unknown_loops += trips is None and traffic.total > before

    visit(entry, 1)
    return traffic


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _again(rest: str, seen: set[str]) -> bool:
    """Whether this is a further stage of a collective that XLA cut into pieces to overlap it with fusions."""
    channel = re.search(r"channel_id=(\d+)", rest)
    if not channel or 'chain_id="' not in rest:
        return False
    known = channel[1] in seen
    seen.add(channel[1])
    return known


def _called(operation: str, rest: str) -> list[str]:
    # A reduction's to_apply is the scalar function that it applies, not a computation that communicates.
    names = [name for key, name in _CALLED.findall(rest) if key != "to_apply" or operation == "call"]
    branches = _BRANCHES.search(rest)
    return names + ([name.strip(" %") for name in branches[1].split(",")] if branches else [])


def _trips(rest: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a while's body runs: what XLA says, else from the counter that its condition compares to a constant.

    The counter begins at zero; its step is what the body adds to it, more than one where XLA has unrolled the loop.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    condition, body = (bodies[re.search(rf"{role}=%?([\w.\-]+)", rest)[1]] for role in ("condition", "body"))
    bounds = [int(bound) for line in condition for bound in _INTEGER.findall(line)]
    counters = [int(index) for line in condition for index in re.findall(r"get-tuple-element\(.*index=(\d+)", line)]
    if len(bounds) != 1 or len(counters) != 1:
        return None
    step = _step(body, counters[0])
    return step and -(-bounds[0] // step)


def _step(body: list[str], counter: int) -> int | None:
    """What a loop's body adds to element `counter` of its state, None where that is not a constant."""
    state = re.findall(r"%[\w.\-]+", next((line for line in body if "ROOT" in line), "").partition(" tuple(")[2])
    definitions = {name: line for line in body if (name := line.strip().removeprefix("ROOT ").partition(" = ")[0])}
    added = re.search(r" add\((%[\w.\-]+), (%[\w.\-]+)\)", definitions.get(state[counter], "")) if state else None
    constants = [_INTEGER.search(definitions.get(name, "")) for name in added.groups()] if added else []
    found = [int(constant[1]) for constant in constants if constant]
    return found[0] if len(found) == 1 and found[0] > 0 else None


def _sent(kind: str, operation: str, shape: str, rest: str, computation: str, devices: int) -> tuple[str, float]:
    """(kind, bytes that a chip sends) of one collective."""
    arrays = [_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(shape)]
    size = max(arrays) if operation.endswith("-start") and kind != "all-reduce" else sum(arrays)
    if kind == "collective-permute":
        return kind, size
    group = _group(rest, devices)
    if kind == "reduce-scatter":
        return kind, size * (group - 1 if not operation.endswith("-start") else (group - 1) / group)
    share = size * (group - 1) / group
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", share
    return kind, share * (2 if kind == "all-reduce" else 1)


def _bytes(dtype: str, sizes: str) -> float:
    bits = _BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
    return bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)


def _group(rest: str, devices: int) -> int:
    """How many chips take part, from any of the three ways in which XLA writes groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices
