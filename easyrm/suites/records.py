"""A record as its suite reads it: whose columns these are, its texts as conversations, its label and id."""

import reprlib
from collections.abc import Sequence
from typing import Any

from easyrm.data.pairs import EMPTY, MALFORMED, Dropped, Messages, messages_of, object_of
from easyrm.data.readers import Record
from easyrm.errors import InputError

_MOST = 16  # columns named in a message


def fields(record: Record, suite: str, columns: Sequence[str], also: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in `record`, which has `columns` and looks like one of `suite`, or of a suite in `also`.

    Raises InputError for columns that are absent and for those of another suite, Dropped for what is no object.
    """
    value = object_of(record)
    if suite_of(value) not in (None, suite, *also) or not all(column in value for column in columns):
        raise wrong_columns(record, suite, columns)
    return value


def wrong_columns(record: Record, suite: str, columns: Sequence[str]) -> InputError:
    """Says what was expected, what was found, and whose it is."""
    other = suite_of(record.value)
    way_out = f"give a file of {suite}" if other in (None, suite) else f"write {other}:{record.file}"
    found = [reprlib.repr(column) for column in record.value][:_MOST]
    more = ", ..." if len(record.value) > _MOST else ""
    return InputError(
        f"{record.where}: {suite} has the columns {', '.join(columns)}; found {', '.join(found)}{more}; {way_out}"
    )


def suite_of(value: dict[str, Any]) -> str | None:
    """The suite whose records look like `value`, None where no suite's do."""
    kinds = {_kind(value.get(side)) for side in ("chosen", "rejected")}
    if kinds == {"messages"}:
        return "pairs"
    if kinds == {"text"} and {"prompt", "subset"} <= value.keys():
        return "rewardbench"
    if kinds == {"texts"} and "prompt" in value:
        return "rm-bench" if "domain" in value else "rewardbench2" if "num_correct" in value else None
    return None


def _kind(side: Any) -> str | None:
    if isinstance(side, str):
        return "text"
    if isinstance(side, list) and side:
        for kind, entry in (("texts", str), ("messages", dict)):
            if all(isinstance(part, entry) for part in side):
                return kind
    return None


def turns(value: dict[str, Any], side: str, where: str) -> tuple[Messages, ...]:
    """The user's `prompt` before each answer in `side`, a text or a list of texts. Raises Dropped as `messages_of`."""
    prompt, answers = value["prompt"], value[side]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(prompt, str) or not isinstance(answers, list):
        raise Dropped(MALFORMED, f"prompt is a {type(prompt).__name__} and {side} a {type(answers).__name__}, not text")
    if not answers:
        raise Dropped(EMPTY, f"{side} has no answers")
    return tuple(
        messages_of({side: [_message("user", prompt), _message("assistant", answer)]}, side, where)
        for answer in answers
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def label(value: dict[str, Any], column: str) -> str:
    """The text in `column`. Raises Dropped for anything else, and for no text."""
    text = value[column]
    if not isinstance(text, str) or not text or text.encode(errors="replace").decode() != text:
        raise Dropped(MALFORMED, f"{column} is {reprlib.repr(text)}, not a name")
    return text
