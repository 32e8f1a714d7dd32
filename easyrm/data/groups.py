"""From a record of ranked responses to a group, or to the reason why it is none."""

from typing import NamedTuple

from easyrm.data.pairs import MALFORMED, TIE, Dropped, Messages, Pair, object_of
from easyrm.data.readers import Record
from easyrm.data.responses import responses_of

LARGEST_GROUP = 16


class Group(NamedTuple):
    """Whole conversations of one prompt and their ranks: integers from 0, the best; equal ones are not compared."""

    responses: tuple[Messages, ...]
    ranks: tuple[int, ...]


def is_group(record: Record) -> bool:
    """Whether `record` has ranked responses and no pair."""
    value = record.value
    return isinstance(value, dict) and value.get("responses") is not None and value.get("chosen") is None


def parse_group(record: Record) -> Group:
    """The group in `record`: `prompt` and `responses` as `responses_of` reads them, best first or ranked by `ranks`.

    `ranks` are integers, lower is better. Raises Dropped (malformed; empty; not_ending_in_assistant; tie: all ranks
    are equal) or InputError (unknown role).
    """
    value = object_of(record)
    responses, ranks = responses_of(value, record.where), value.get("ranks")
    if not 2 <= len(responses) <= LARGEST_GROUP:
        raise Dropped(MALFORMED, f"{len(responses)} responses; a group has 2 to {LARGEST_GROUP}")
    if ranks is None:
        return Group(responses, tuple(range(len(responses))))
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or len(ranks) != len(responses):
        raise Dropped(MALFORMED, f"ranks is not a list of {len(responses)} integers, one a response")
    levels = sorted(set(ranks))
    if len(levels) == 1:
        raise Dropped(TIE, "all responses have the same rank")
    return Group(responses, tuple(levels.index(rank) for rank in ranks))


def group_of_pair(pair: Pair) -> Group:
    """A pair as a group of two."""
    return Group((pair.chosen, pair.rejected), (0, 1))
