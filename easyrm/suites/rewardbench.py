"""RewardBench's core set: pairs in 23 subsets of four sections (Lambert et al. 2024, arXiv 2403.13787)."""

import reprlib
from collections.abc import Sequence
from typing import Any

from easyrm.data.pairs import json_id, parse_pair
from easyrm.data.readers import Record
from easyrm.errors import InputError
from easyrm.suites.counting import by_subset, mean, pair_verdict
from easyrm.suites.item import Answer, Item
from easyrm.suites.records import fields, label, suite_of, turns

HUB = "hf://allenai/reward-bench:filtered"
COLUMNS = ("prompt", "chosen", "rejected", "subset")
_CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")
# The weight of a subset in its section: its pairs, but for math-prm, which counts as much as all code together.
SECTIONS = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {"math-prm": 984, **dict.fromkeys(_CODE, 164)},
}
_KNOWN = {subset for section in SECTIONS.values() for subset in section}


def parse(record: Record) -> Item:
    """The pair in `record`: strings with their prompt, or two whole conversations.

    Raises InputError for other columns and for a subset that is none of RewardBench's, else Dropped as `parse_pair`.
    """
    messages = isinstance(record.value, dict) and suite_of(record.value) == "pairs"
    value = fields(record, "rewardbench", COLUMNS[1:] if messages else COLUMNS, also=("pairs",))
    subset = label(value, "subset")
    _check(subset, f"{record.where}: ")
    if messages:
        pair = parse_pair(record)
        return Item(json_id(value), subset, (pair.chosen,), (pair.rejected,), record.where)
    chosen, rejected = (turns(value, side, record.where) for side in ("chosen", "rejected"))
    return Item(json_id(value), subset, chosen, rejected, record.where)


def _check(subset: str, where: str = "") -> None:
    if subset not in _KNOWN:
        raise InputError(
            f"{where}the subset {reprlib.repr(subset)} is none of RewardBench's {len(_KNOWN)}; mend it, or give other "
            "pairs as pairs:FILE"
        )


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """score, chat, chat_hard, safety, reasoning, accuracy (of all pairs alike), ties (which are wrong).

    A section is the mean accuracy of its subsets that are present, weighted as in rewardbench 0.1.4
    (`calculate_scores_per_section`); one without any is absent. `score` is the mean of the four sections, as on the
    published cards, and absent unless all are there; the old leaderboard's total had the prior sets in it besides.
    Raises InputError for a subset that is none of RewardBench's.
    """
    for answer in answers:
        _check(answer.subset)
    accuracy = {subset: counted["accuracy"] for subset, counted in subsets(answers).items()}
    sections = {}
    for section, weights in SECTIONS.items():
        if present := {subset: weight for subset, weight in weights.items() if subset in accuracy}:
            weighted = sum(accuracy[subset] * weight for subset, weight in present.items())
            sections[section] = weighted / sum(present.values())
    verdicts = [pair_verdict(answer) for answer in answers]
    return {
        **({"score": mean(sections.values())} if len(sections) == len(SECTIONS) else {}),
        **sections,
        "accuracy": mean(verdict.credit for verdict in verdicts),
        "ties": sum(verdict.tied for verdict in verdicts),
    }


def subsets(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """See `by_subset`."""
    return by_subset(answers, pair_verdict)
