"""Answers counted: shares, ties and margins, of all and of each subset."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from easyrm.suites.interval import wilson
from easyrm.suites.item import Answer


class Verdict(NamedTuple):
    """One answer: its credit in [0, 1], whether equal rewards took credit away, and the margin of reward."""

    credit: float
    tied: bool
    margin: float


def mean(values: Iterable[float]) -> float:
    """Of no values: 0."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def pair_verdict(answer: Answer) -> Verdict:
    """Of one chosen and one rejected answer; a tie counts as wrong."""
    (chosen,), (rejected,) = answer.chosen, answer.rejected
    return Verdict(float(chosen > rejected), chosen == rejected, chosen - rejected)


def by_subset(answers: Sequence[Answer], verdict_of: Callable[[Answer], Verdict]) -> dict[str, dict[str, Any]]:
    """Each subset, in the order of its first answer: count, correct, ties, accuracy, interval (95 %), mean margin.

    `correct` is the sum of the credits. Answers without a subset are left out here; the suite's figures have them.
    """
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    for answer in answers:
        if answer.subset:
            verdicts[answer.subset].append(verdict_of(answer))
    return {subset: _counted(those) for subset, those in verdicts.items()}


def _counted(verdicts: list[Verdict]) -> dict[str, Any]:
    correct = math.fsum(verdict.credit for verdict in verdicts)
    return {
        "count": len(verdicts),
        "correct": int(correct) if correct.is_integer() else correct,
        "ties": sum(verdict.tied for verdict in verdicts),
        "accuracy": correct / len(verdicts),
        "interval": list(wilson(correct, len(verdicts))),
        "margin": mean(verdict.margin for verdict in verdicts),
    }
