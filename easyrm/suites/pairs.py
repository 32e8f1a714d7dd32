"""Pairs in easyrm's own format: how often the chosen conversation has the higher reward."""

from collections.abc import Sequence
from typing import Any

from easyrm.data.pairs import json_id, object_of, parse_pair
from easyrm.data.readers import Record
from easyrm.suites.counting import by_subset, mean, pair_verdict
from easyrm.suites.interval import wilson
from easyrm.suites.item import Answer, Item
from easyrm.suites.records import label, suite_of, wrong_columns

HUB = None
COLUMNS = ("chosen", "rejected")


def parse(record: Record) -> Item:
    """The pair in `record`, and its `subset` if it has one. Raises as `parse_pair`, InputError for another suite's."""
    value = object_of(record)
    if suite_of(value) not in (None, "pairs"):
        raise wrong_columns(record, "pairs", COLUMNS)
    pair = parse_pair(record)
    subset = "" if value.get("subset") is None else label(value, "subset")
    return Item(json_id(value), subset, (pair.chosen,), (pair.rejected,), record.where)


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """accuracy (ties are wrong) and its interval_low and interval_high (95 %), mean margin of reward, pairs, ties."""
    verdicts = [pair_verdict(answer) for answer in answers]
    credits = [verdict.credit for verdict in verdicts]
    low, high = wilson(sum(credits), len(credits))
    return {
        "accuracy": mean(credits),
        "margin": mean(verdict.margin for verdict in verdicts),
        "pairs": len(verdicts),
        "ties": sum(verdict.tied for verdict in verdicts),
        "interval_low": low,
        "interval_high": high,
    }


def subsets(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """See `by_subset`."""
    return by_subset(answers, pair_verdict)
