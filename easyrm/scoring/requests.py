"""Lines that are to be scored: a pair, one conversation, or one prompt with many responses; and their answers."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from easyrm.data.conversations import Conversation, encode_conversations
from easyrm.data.pairs import Dropped, Messages, json_id, messages_of, object_of, sides_of
from easyrm.data.readers import Record
from easyrm.data.responses import responses_of
from easyrm.data.tokenizer import Tokenizer

PAIR, CONVERSATION, CANDIDATES = "pairs", "conversations", "candidate lists"
ERROR = "errors"


class Request(NamedTuple):
    """One line: its conversations or, with `error`, none; `id` is JSON text, None where the line has none."""

    kind: str
    id: str | None
    conversations: tuple[Messages, ...] = ()
    error: str | None = None


def parse_request(record: Record) -> Request:
    """What a record asks for. Raises InputError for an unknown role; any other fault is the answer's `error`."""
    id = None
    try:
        value = object_of(record)
        id = json_id(value)
        # A pair is one for training, too, whatever columns it has beside; null is a column that a record does not have.
        if any(value.get(side) is None for side in ("chosen", "rejected")):
            if value.get("messages") is not None:
                return Request(CONVERSATION, id, (messages_of(value, "messages", record.where),))
            if value.get("responses") is not None:
                return Request(CANDIDATES, id, responses_of(value, record.where))
        return Request(PAIR, id, sides_of(value, record.where))
    except Dropped as dropped:
        return Request(ERROR, id, error=str(dropped))


class Encoded(NamedTuple):
    """Requests and, in order, the conversations of those that have no `error`."""

    requests: list[Request]
    conversations: list[Conversation]


def encode_requests(requests: Iterable[Request], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """A request of which one conversation cannot be scored (overlong, refused by the tokenizer) becomes an error."""
    requests = list(requests)
    found = iter(
        encode_conversations(tokenizer, list(chain.from_iterable(r.conversations for r in requests)), max_length)
    )
    checked, conversations = [], []
    for request in requests:
        mine = [next(found) for _ in request.conversations]
        if bad := next((one for one in mine if isinstance(one, Dropped)), None):
            request = Request(ERROR, request.id, error=str(bad))
        else:
            conversations += mine
        checked.append(request)
    return Encoded(checked, conversations)


def answer(request: Request, rewards: Iterator[float]) -> tuple[str, str]:
    """(kind, line of JSON) of one request, whose rewards come next; the line has its `id` where it has one."""
    kind, id, conversations, error = request
    mine = [next(rewards) for _ in conversations] if error is None else []
    if not all(map(math.isfinite, mine)):
        error = f"the model gave {mine}, which is not finite"
    if error is not None:
        kind, values = ERROR, {"error": error}
    elif kind == PAIR:
        values = {"chosen": mine[0], "rejected": mine[1]}
    else:
        values = {"reward": mine[0]} if kind == CONVERSATION else {"rewards": mine}
    line = json.dumps(values)
    return kind, line if id is None else f'{{"id": {id}, {line[1:]}'
