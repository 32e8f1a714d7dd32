"""The suites by name, and what a list such as `rewardbench,rm-bench:FILE,heldout.jsonl` asks for."""

import re
from collections.abc import Collection
from types import ModuleType
from typing import NamedTuple

from etils import epath

from easyrm.errors import InputError
from easyrm.suites import pairs, rewardbench, rewardbench2, rm_bench

SUITES: dict[str, ModuleType] = {
    "pairs": pairs,
    "rewardbench": rewardbench,
    "rewardbench2": rewardbench2,
    "rm-bench": rm_bench,
}
_LONGEST = 100  # of a name; file systems take 255 bytes
_FORMS = "write SUITE, SUITE:FILE or, for pairs, FILE"


class Request(NamedTuple):
    """One evaluation: `suite` is a key of SUITES, `source` what it reads, `name` unique and fit for a file's name."""

    name: str
    suite: str
    source: str


def parse_suites(spec: str, taken: Collection[str] = ()) -> list[Request]:
    """The evaluations that a comma-separated list asks for: SUITE (its data on the hub), SUITE:SOURCE, or SOURCE.

    SOURCE (a file, directory, glob, gs://... or hf://...) alone is of pairs. A request is named by its suite, by its
    file where that is pairs; where the name is one of `taken` or of a request before, it ends in -2, -3 ... Raises
    InputError for `pairs` alone, which has no data on the hub, and for what is neither a suite nor there.
    """
    requests: list[Request] = []
    for part in filter(None, map(str.strip, spec.split(","))):
        suite, source = _split(part)
        used = {name.casefold() for name in (*taken, *(request.name for request in requests))}
        name = first = _stem(source) if suite == "pairs" else suite
        number = 1
        while name.casefold() in used:
            number += 1
            name = f"{first}-{number}"
        requests.append(Request(name, suite, source))
    return requests


def _split(part: str) -> tuple[str, str]:
    """(suite, source). A colon is of the source, unless the name of a suite stands before it."""
    suite, colon, source = part.partition(":")
    if suite not in SUITES:
        if "://" not in part and not set(part) & set("*?[") and not epath.Path(part).exists():
            raise InputError(
                f"evaluation {part}: neither a suite ({', '.join(SUITES)}) nor a file that is there; {_FORMS}"
            )
        return "pairs", part
    source = source.strip() if colon else SUITES[suite].HUB
    if not source:
        raise InputError(f"evaluation {part}: no file is named; write {suite}:FILE")
    return suite, source


def _stem(source: str) -> str:
    """What a source is called without its directory and suffixes, in letters that any file system takes."""
    last = source.rstrip("/").rpartition("/")[2]
    stem = re.sub(r"(\.(jsonl|json|parquet))?(\.gz)?$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:_LONGEST] or "pairs"
