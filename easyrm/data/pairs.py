"""From a record to a pair of conversations, or to the reason why it is none."""

import json
import math
import reprlib
from typing import NamedTuple

from easyrm.data.readers import Record
from easyrm.data.template import ROLES
from easyrm.errors import InputError

MALFORMED = "malformed"
EMPTY = "empty"
NOT_ENDING_IN_ASSISTANT = "not_ending_in_assistant"
IDENTICAL = "identical"
TIE = "tie"
DUPLICATE = "duplicate"
OVERLONG = "overlong"
REASONS = (MALFORMED, EMPTY, NOT_ENDING_IN_ASSISTANT, IDENTICAL, TIE, DUPLICATE, OVERLONG)

_LARGEST_MARGIN = (2 - 2**-23) * 2.0**127  # of float32, as which margins are kept

Messages = list[dict[str, str]]


class Pair(NamedTuple):
    """Two whole conversations; `margin` and `probability` are nan where the record has none, `id` None.

    `probability`, in [0, 1], is that chosen is the better one.
    """

    chosen: Messages
    rejected: Messages
    margin: float
    id: str | int | None
    where: str
    probability: float = math.nan


class Dropped(Exception):
    """A record that is no usable pair: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_pair(record: Record) -> Pair:
    """The pair in `record`. Raises Dropped (malformed, empty, not_ending_in_assistant) or InputError (unknown role)."""
    value = object_of(record)
    chosen, rejected = sides_of(value, record.where)
    margin = _number(value, "margin", -_LARGEST_MARGIN, _LARGEST_MARGIN, "a finite number of 32 bits")
    probability = _number(value, "probability", 0, 1, "a number in [0, 1]")
    return Pair(chosen, rejected, margin, value.get("id"), record.where, probability)


def sides_of(value: dict, where: str) -> tuple[Messages, Messages]:
    """Both whole conversations of a pair, checked. Raises as `parse_pair` does; `where` names the record."""
    chosen, rejected = (messages_of(value, side, where) for side in ("chosen", "rejected"))
    if value.get("prompt") is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise Dropped(MALFORMED, "its prompt stands beside chosen and rejected; put it in front of both")
    return chosen, rejected


def check_pair(pair: Pair, *, drop_ties: bool) -> Pair:
    """`pair`, if it can teach a preference. Raises Dropped (identical; tie: a margin of 0, where asked)."""
    if _bare(pair.chosen) == _bare(pair.rejected):
        raise Dropped(IDENTICAL, "chosen and rejected are the same conversation")
    if drop_ties and pair.margin == 0:
        raise Dropped(TIE, "the margin is 0")
    return pair


def object_of(record: Record) -> dict:
    """The JSON object in `record`. Raises Dropped (malformed) for what is none."""
    if record.error is not None:
        raise Dropped(MALFORMED, record.error)
    if not isinstance(record.value, dict):
        raise Dropped(MALFORMED, f"a {type(record.value).__name__} where an object should be")
    return record.value


def json_id(value: dict) -> str | None:
    """The `id` of a record as JSON text; what JSON has no form for (dates, bytes of Parquet) is written as a string.

    Raises Dropped (malformed) for one that is nested too deeply to be written.
    """
    if "id" not in value:
        return None
    try:
        return json.dumps(value["id"], default=str)
    except (RecursionError, TypeError, ValueError) as error:
        raise Dropped(MALFORMED, f"id cannot be written as JSON ({error})") from error


def messages_of(value: dict, key: str, where: str) -> Messages:
    """The conversation under `key`, checked. Raises as `parse_pair` does; `where` names the record."""
    messages = value.get(key)
    if not isinstance(messages, list):
        found = "is missing" if messages is None else f"is a {type(messages).__name__}"
        raise Dropped(MALFORMED, f"{key} {found}, not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise Dropped(MALFORMED, f"{key} has a message without a role and a content of text")
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: {key} has the role {reprlib.repr(message['role'])}; the roles are {', '.join(ROLES)}"
            )
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise Dropped(MALFORMED, f"{key} has a message that is no Unicode text ({error})") from error
    if not messages:
        raise Dropped(EMPTY, f"{key} has no messages")
    if not all(message["content"].strip() for message in messages):
        raise Dropped(EMPTY, f"{key} has a message without text")
    if messages[-1]["role"] != "assistant":
        raise Dropped(NOT_ENDING_IN_ASSISTANT, f"{key} ends in a message of the {messages[-1]['role']}")
    return messages


def _number(value: dict, key: str, least: float, most: float, kind: str) -> float:
    """The number under `key`, nan where there is none. Raises Dropped (malformed) for what is not `kind`."""
    number = value.get(key)
    if number is None:
        return math.nan
    if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
        raise Dropped(MALFORMED, f"{key} is {reprlib.repr(number)}, not {kind}")
    return float(number)


def _bare(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]
