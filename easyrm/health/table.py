"""The findings of all hosts as one table of 100 columns, or as one JSON object."""

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Finding, host_numbers
from easyrm.redact import redact, redact_tree

WIDTH = 100
ORDER = (
    *("settings", "versions", "coordinator", "hosts", "tpu", "output_dir", "shared", "cache", "disk", "memory"),
    *("hub", "model", "tokenizer", "data.train", "data.eval", "eval.suites", "devices", "mesh", "matmul", "all-reduce"),
)
_STATES = (FAIL, WARN, OK, SKIPPED)


@dataclasses.dataclass
class Row:
    """A finding and the hosts that have it."""

    finding: Finding
    hosts: list[int]

    @property
    def found(self) -> str:
        """What was found, with the least and the largest of each measured figure."""
        text = self.finding.found
        for name, numbers in self.finding.figures.items():
            least, most = _number(min(numbers)), _number(max(numbers))
            text = text.replace(f"{{{name}}}", least if least == most else f"{least} to {most}")
        return text


def merge(found: Iterable[tuple[int, Finding]]) -> list[Row]:
    """Rows in the order of checks, those that differ in measured figures alone as one."""
    rows: dict[tuple, Row] = {}
    for host, finding in found:
        key = (finding.check, finding.state, finding.found, finding.way_out)
        row = rows.setdefault(key, Row(dataclasses.replace(finding, figures={}), []))
        if host not in row.hosts:
            row.hosts.append(host)
        for name, numbers in finding.figures.items():
            row.finding.figures.setdefault(name, []).extend(numbers)
    places = {name: place for place, name in enumerate(ORDER)}
    order = sorted(
        rows.values(),
        key=lambda row: (places.get(row.finding.check, len(ORDER)), _STATES.index(row.finding.state), min(row.hosts)),
    )
    for row in order:
        row.hosts.sort()
    return order


def as_text(rows: Sequence[Row], count: int) -> str:
    """The table; over several hosts (`count`) with a column that says whose line it is."""
    titles = ("check", "state", "hosts") if count > 1 else ("check", "state")
    cells = [(row.finding.check, row.finding.state, host_numbers(row.hosts))[: len(titles)] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = ["  ".join([*map(str.ljust, titles, widths), "found"])]
    indent = " " * (sum(widths) + 2 * len(widths))
    before = ""
    for row, (check, *rest) in zip(rows, cells, strict=True):
        first = "  ".join(map(str.ljust, ("" if check == before else check, *rest), widths)) + "  "
        lines += _wrapped(redact(row.found), first, indent)
        if row.finding.way_out:
            lines += _wrapped(redact(row.finding.way_out), f"{indent}-> ", f"{indent}   ")
        before = check
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """How many lines have which state: "1 FAIL, 2 warn, 9 ok"."""
    counts = {state: sum(row.finding.state == state for row in rows) for state in _STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def as_dict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values without secrets; `figures` holds what each host or device measured."""
    return redact_tree([
        {
            "check": row.finding.check,
            "state": row.finding.state,
            "hosts": row.hosts,
            "found": row.found,
            "way_out": row.finding.way_out,
            "figures": row.finding.figures,
        }
        for row in rows
    ])  # fmt: skip


def _wrapped(text: str, first: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    ) or [first.rstrip()]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
