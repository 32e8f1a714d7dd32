"""A suite's questions, read and tokenized once, and a model's answers to them."""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from easyrm import __version__
from easyrm.data import sources
from easyrm.data.conversations import Conversation, check_vocabulary, encode_conversations
from easyrm.data.pairs import Dropped
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError
from easyrm.evaluation_files import PAIRWISE
from easyrm.scoring.scorer import Scorer
from easyrm.suites.item import Answer, Item
from easyrm.suites.registry import SUITES, Request

_AT_ONCE = 256  # items tokenized at once
_SHOWN = 3  # dropped records that are said one by one


class Question(NamedTuple):
    """An item as token ids."""

    item: Item
    chosen: tuple[Conversation, ...]
    rejected: tuple[Conversation, ...]


class Questions(NamedTuple):
    """What of a suite can be asked; `read` = len(questions) + the sum of `dropped`, which counts by reason."""

    request: Request
    questions: list[Question]
    read: int
    dropped: dict[str, int]
    fingerprint: str


class Evaluation(NamedTuple):
    """`report` as NAME.json keeps it, and the lines of NAME.scores.jsonl."""

    report: dict[str, Any]
    scores: list[dict[str, Any]]


def read_questions(
    request: Request, tokenizer: Tokenizer, max_length: int, vocab_size: int, say: Callable[[str], None]
) -> Questions:
    """Reads `request.source`. An item of which one conversation cannot be scored is dropped whole, and counted.

    Raises InputError for missing files, for columns of another suite, for token ids that a model of `vocab_size` lacks,
    and where nothing is left.
    """
    questions, dropped, digest, read = [], Counter(), hashlib.sha256(), 0

    def drop(where: str, why: Dropped) -> None:
        dropped[why.reason] += 1
        if dropped[why.reason] <= _SHOWN:
            say(f"dropped {where}: {why}")

    def items() -> Iterator[Item]:
        nonlocal read
        for record in sources.read(request.source, say):
            read += 1
            try:
                yield SUITES[request.suite].parse(record)
            except Dropped as why:
                drop(record.where, why)

    for some in _portions(items()):
        texts = [messages for item in some for messages in (*item.chosen, *item.rejected)]
        found = encode_conversations(tokenizer, texts, max_length)
        check_vocabulary(found, vocab_size)
        found = iter(found)
        for item in some:
            chosen, rejected = (tuple(next(found) for _ in side) for side in (item.chosen, item.rejected))
            if bad := next((one for one in (*chosen, *rejected) if isinstance(one, Dropped)), None):
                drop(item.where, bad)
                continue
            for conversation in (*chosen, *rejected):
                digest.update(len(conversation.tokens).to_bytes(4, "little") + conversation.tokens.tobytes())
            questions.append(Question(item._replace(chosen=(), rejected=()), chosen, rejected))
    counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    if not questions:
        raise InputError(f"{request.source}: nothing to evaluate among {read} records (dropped: {counts})")
    say(f"suite {request.name}: {len(questions)} of {read} records (dropped: {counts})")
    return Questions(request, questions, read, dict(dropped), digest.hexdigest())


def _portions(items: Iterator[Item]) -> Iterator[list[Item]]:
    while some := list(itertools.islice(items, _AT_ONCE)):
        yield some


def judge(
    questions: Questions, scorer: Scorer, dtype: str, stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """The model's rewards of all questions and the suite's figures of them; None where `stop` ended it."""
    began, before = time.monotonic(), scorer.counts.copy()
    asked = [conversation for _, *sides in questions.questions for side in sides for conversation in side]
    rewards = scorer.score(asked, stop)
    if rewards is None:
        return None
    rewards, answers, lines = iter(rewards), [], []
    for item, chosen, rejected in questions.questions:
        answer = Answer(item.id, item.subset, *(tuple(next(rewards) for _ in side) for side in (chosen, rejected)))
        answers.append(answer)
        lines.append(_line(answer, chosen, rejected, one=questions.request.suite in PAIRWISE))
    suite = SUITES[questions.request.suite]
    counts = scorer.counts - before
    report = {
        "suite": questions.request.suite,
        "name": questions.request.name,
        "source": questions.request.source,
        "step": scorer.step,
        "model": scorer.name,
        "evaluator": f"easyrm {__version__}",
        "dtype": dtype,
        "max_length": scorer.max_length,
        "fingerprint": questions.fingerprint,
        "read": questions.read,
        "scored": len(answers),
        "dropped": questions.dropped,
        "figures": suite.figures(answers),
        "subsets": suite.subsets(answers),
        "tokens_computed": counts["tokens_computed"],
        "tokens_unique": counts["tokens_unique"],
        "tokens": sum(len(conversation.tokens) for conversation in asked),
        "seconds": round(time.monotonic() - began, 3),
    }
    return Evaluation(report, lines)


def _line(
    answer: Answer, chosen: tuple[Conversation, ...], rejected: tuple[Conversation, ...], *, one: bool
) -> dict[str, Any]:
    """Scalars where a suite has `one` on each side, else lists."""
    values = {"chosen": answer.chosen, "rejected": answer.rejected}
    for side, conversations in (("chosen", chosen), ("rejected", rejected)):
        values[f"{side}_tokens"] = tuple(len(conversation.tokens) for conversation in conversations)
    if one:
        values = {name: value[0] for name, value in values.items()}
    head = {"id": json.loads(answer.id)} if answer.id is not None else {}
    return head | ({"subset": answer.subset} if answer.subset else {}) | values
