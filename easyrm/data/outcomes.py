"""What became of each record that was to be scored, on disk and in order."""

import json
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from easyrm.data.pairs import MALFORMED, Dropped
from easyrm.data.readers import Record


class Outcome(NamedTuple):
    """One record: `id` as JSON text (None: it has none), `single` for one conversation, `error` if it has no reward."""

    id: str | None
    single: bool
    error: str | None


class Outcomes:
    """A spool of outcomes: written once, then read; memory does not grow with it."""

    def __init__(self):
        self._file = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 (it lives as long as its owner)

    def add(self, outcome: Outcome) -> None:
        self._file.write(json.dumps(outcome) + "\n")

    def __iter__(self) -> Iterator[Outcome]:
        self._file.seek(0)
        return (Outcome(*json.loads(line)) for line in self._file)


def json_id(record: Record) -> str | None:
    """The record's `id` as JSON text; what JSON has no form for (dates, bytes of Parquet) is written as a string.

    Raises Dropped (malformed) for one that is nested too deeply to be written.
    """
    if not isinstance(record.value, dict) or "id" not in record.value:
        return None
    try:
        return json.dumps(record.value["id"], default=str)
    except (RecursionError, TypeError, ValueError) as error:
        raise Dropped(MALFORMED, f"id cannot be written as JSON ({error})") from error
