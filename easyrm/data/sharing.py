"""Conversations that are to be scored, as segments of rows: each distinct one once, two a prompt.

A row's layout lets two responses share the prompt between them: of k, the prompt is computed ceil(k / 2) times.
"""

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from easyrm.data.conversations import Conversation
from easyrm.data.packing import RowBatch, RowShape, pack, pair_lengths, place
from easyrm.data.store import TokenPair, common_prefix

_UNIT = 128  # of row lengths
_LENGTHS = 6  # row lengths that are tried
_NEARLY = 1.03  # computed tokens, times the fewest, that a shorter row may cost
_TOKENS_A_SLOT = 32  # of a batch's tokens; more, shorter segments need more slots


def share(conversations: Sequence[Conversation]) -> tuple[list[TokenPair], np.ndarray]:
    """(segments, int64[n]): conversation i is side `at[i] % 2` (0: chosen) of segment `at[i] // 2`.

    A segment is two conversations of one prompt in a TokenPair, or one on both its sides.
    """
    distinct: dict[bytes, int] = {}
    which = [distinct.setdefault(conversation.tokens.tobytes(), len(distinct)) for conversation in conversations]
    tokens: list[np.ndarray] = [None] * len(distinct)
    members: dict[Hashable, list[int]] = {}
    for conversation, number in zip(conversations, which, strict=True):
        if tokens[number] is None:
            tokens[number] = conversation.tokens
            members.setdefault(conversation.prompt, []).append(number)
    segments, at = [], np.empty(len(distinct), np.int64)
    for numbers in members.values():
        for i in range(0, len(numbers), 2):
            two = numbers[i : i + 2]
            at[two] = 2 * len(segments) + np.arange(len(two))
            a, b = tokens[two[0]], tokens[two[-1]]
            segments.append(TokenPair(a, b, common_prefix(a, b), math.nan, ""))
    return segments, at[which]


def fill_rows(
    segments: Sequence[TokenPair], *, batch_tokens: int, row_groups: int, pad_id: int
) -> Iterator[tuple[np.ndarray, RowBatch]]:
    """(indices of segments, their rows): each segment once, in the order in which they fill rows best.

    The batches have one shape of at most about `batch_tokens`, in steps of half a power of two: few shapes, whatever
    comes. Slot b of a batch is segment indices[b].
    """
    lengths = pair_lengths(segments)
    plans = [_plan(lengths, length, batch_tokens, row_groups) for length in _row_lengths(lengths, batch_tokens)]
    fewest = min(batches * shape.capacity for batches, shape, _ in plans)
    _, shape, row_of = next(plan for plan in plans if plan[0] * plan[1].capacity <= _NEARLY * fewest)
    for first in range(0, row_of.max() + 1, shape.rows):
        indices = np.flatnonzero((first <= row_of) & (row_of < first + shape.rows))
        slots = _step_up(max(shape.capacity // _TOKENS_A_SLOT, len(indices)))
        layout = {"micro_batches": 1, "packing": True, "batch_size": slots, "row_groups": row_groups}
        yield indices, pack([segments[index] for index in indices], shape, pad_id=pad_id, **layout)


def _row_lengths(lengths: np.ndarray, batch_tokens: int) -> list[int]:
    """Row lengths worth trying: from what the longest segment needs to what all need, some of them."""
    found = [_UNIT * _step_up(-(-int(lengths.sum(axis=-1).max()) // _UNIT))]
    while len(found) < _LENGTHS and found[-1] < min(lengths.sum(), batch_tokens):
        found.append(_UNIT * _step_up(found[-1] // _UNIT + 1))
    return found


def _plan(lengths: np.ndarray, length: int, batch_tokens: int, row_groups: int) -> tuple[int, RowShape, np.ndarray]:
    """(batches, their shape, the row of each segment among the rows of all batches)."""
    # First fit never leaves two rows that are both less than half full.
    enough = min(len(lengths), 2 * -(-int(lengths.sum()) // length) + 1)
    row_of = place(lengths[None], RowShape(enough, length), micro_batches=1).row[0, :, 0]
    rows = -(-(int(row_of.max()) + 1) // row_groups)  # for each group
    batches = -(-rows // max(1, batch_tokens // (length * row_groups)))
    return batches, RowShape(row_groups * _step_up(-(-rows // batches)), length), row_of


def _step_up(value: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    power = 1 << (value - 1).bit_length()
    return power * 3 // 4 if power >= 4 and value <= power * 3 // 4 else power
