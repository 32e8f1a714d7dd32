"""RM-Bench: three chosen and three rejected answers to a prompt, each plain, detailed, and detailed in Markdown.

Liu et al. 2024, arXiv 2410.16184; counted as by the authors' code (THU-KEG/RM-Bench, scripts/utils.py).
"""

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from easyrm.data.pairs import MALFORMED, Dropped, json_id
from easyrm.data.readers import Record
from easyrm.errors import InputError
from easyrm.suites.counting import Verdict, by_subset, mean
from easyrm.suites.item import Answer, Item
from easyrm.suites.records import fields, label, turns

HUB = "hf://THU-KEG/RM-Bench:train"
COLUMNS = ("prompt", "chosen", "rejected", "domain")
STYLES = 3
DOMAINS = {"chat": "chat", "math": "math", "code": "code", "safety-refuse": "safety", "safety-response": "safety"}


def parse(record: Record) -> Item:
    """The answers in their three styles; the subset is the record's domain.

    Raises InputError for other columns and for an unknown domain, Dropped for a faulty record.
    """
    value = fields(record, "rm-bench", COLUMNS)
    domain = label(value, "domain")
    _check(domain, f"{record.where}: ")
    chosen, rejected = (turns(value, side, record.where) for side in ("chosen", "rejected"))
    if len(chosen) != STYLES or len(rejected) != STYLES:
        raise Dropped(MALFORMED, f"{len(chosen)} chosen and {len(rejected)} rejected answers, not {STYLES} each")
    return Item(json_id(value), domain, chosen, rejected, record.where)


def _check(domain: str, where: str = "") -> None:
    if domain not in DOMAINS:
        raise InputError(f"{where}the domain {reprlib.repr(domain)} is none of RM-Bench's: {', '.join(DOMAINS)}")


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """score, easy, normal, hard, chat, math, code, safety: shares of the nine comparisons won; ties are wrong.

    hard: chosen answers against rejected ones of a richer style; normal: of the same style; easy: of a plainer one. A
    domain is the mean of the three, and absent without any prompt; all prompts of safety count alike, those to refuse
    and those to respond to. easy, normal and hard are means over the domains that are there; `score` is the mean of the
    four domains, and absent unless all are. Raises InputError for another domain.
    """
    won: dict[str, list[np.ndarray]] = {}
    for answer in answers:
        _check(answer.subset)
        won.setdefault(DOMAINS[answer.subset], []).append(_won(answer))
    shares = {domain: np.mean(won[domain], axis=0) for domain in dict.fromkeys(DOMAINS.values()) if domain in won}
    found = {domain: float(share.mean()) for domain, share in shares.items()}
    upper = np.triu(np.ones((STYLES, STYLES), bool), 1)
    kinds = {"easy": upper.T, "normal": np.eye(STYLES, dtype=bool), "hard": upper} if found else {}
    return {
        **({"score": mean(found.values())} if len(found) == len(set(DOMAINS.values())) else {}),
        **{kind: mean(float(share[cells].mean()) for share in shares.values()) for kind, cells in kinds.items()},
        **found,
    }


def _won(answer: Answer) -> np.ndarray:
    """[STYLES, STYLES] of chosen by rejected answers, each from plain to rich."""
    return np.greater.outer(answer.chosen, answer.rejected)


def nine(answer: Answer) -> Verdict:
    """The share of the nine comparisons won; the margin is their mean."""
    tied = bool(np.equal.outer(answer.chosen, answer.rejected).any())
    return Verdict(float(_won(answer).mean()), tied, mean(answer.chosen) - mean(answer.rejected))


def subsets(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """See `by_subset`: count is of prompts, whose credit is `nine`; ties are prompts with any."""
    return by_subset(answers, nine)
