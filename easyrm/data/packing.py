"""Pairs into rows: the layout in which every token's visible keys are one interval of its row.

A pair is laid out once as [chosen continuation, reversed | prompt | rejected continuation]. Positions say where a token
stands in its own conversation; attention does not care in which order keys are stored.

A group of k ranked responses is ceil(k / 2) such units, each two responses; an odd last one stands on both sides.

S pairs or units, M micro-batches, R rows a micro-batch, L row length, B slots of pairs or groups, H units a group (1 of
pairs).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from easyrm.data.placement import Placement, RowShape, place


class RowBatch(NamedTuple):
    """One optimizer batch as arrays, a pytree.

    A token sees the columns first_key..last_key (both included) of its row; a padding token only itself. The last token
    of slot b's chosen side stands at (chosen_row, chosen_column)[m, b] of micro-batch m. Unused slots have weight 0 and
    point at (0, 0). An absent margin is 0, an absent probability 1. `order` says which of the batch's pairs a slot has,
    -1 for none.

    Of groups, slots b * H to b * H + H - 1 are the units of group b, and the ranks of both sides are there too: -1
    where a side is no response of its own.
    """

    tokens: np.ndarray  # int32[M, R, L], as the next three
    positions: np.ndarray
    first_key: np.ndarray
    last_key: np.ndarray
    chosen_row: np.ndarray  # int32[M, B * H], as the next three
    chosen_column: np.ndarray
    rejected_row: np.ndarray
    rejected_column: np.ndarray
    margin: np.ndarray  # float32[M, B], as the next two
    weight: np.ndarray
    probability: np.ndarray
    order: np.ndarray  # int32[M, B]
    chosen_rank: np.ndarray | None = None  # int32[M, B * H], as the next; None of pairs
    rejected_rank: np.ndarray | None = None


def pack(
    pairs: Sequence,
    shape: RowShape,
    *,
    pad_id: int,
    batch_size: int,
    micro_batches: int = 1,
    packing: bool = True,
    row_groups: int = 1,
    width: int = 0,
) -> RowBatch:
    """Lays out up to `batch_size` pairs (as TokenPair) in rows of `shape`; with `width`, groups of up to `width` units.

    Deterministic. The rows of a micro-batch are dealt to `row_groups` equal, contiguous groups of devices so that each
    sees about the same number of keys. Raises ValueError if the pairs do not fit: shapes come from `row_plan`, where
    they do.
    """
    groups, units = (pairs, width) if width else ([[pair] for pair in pairs], 1)
    lengths = group_lengths(groups, units)
    placed = place(lengths[None], shape, micro_batches=micro_batches, packing=packing)
    if len(pairs) > batch_size or not placed.fits[0]:
        raise ValueError(f"{len(pairs)} pairs (batch_size={batch_size}) do not fit {shape}")
    arrays, ends = _fill(groups, units, placed, shape, pad_id)
    arrays, row_in_micro = _deal(arrays, micro_batches=micro_batches, row_groups=row_groups)
    slots = np.zeros((4, micro_batches, batch_size * units), np.int32)
    ranks = np.full((2, micro_batches, batch_size * units), -1, np.int32)
    margin, weight = np.zeros((2, micro_batches, batch_size), np.float32)
    probability, order = np.ones_like(weight), np.full(weight.shape, -1, np.int32)
    used = [0] * micro_batches
    for number, group in enumerate(groups):
        m = placed.row[0, number * units, 0] % micro_batches
        b, used[m] = used[m], used[m] + 1
        margin[m, b], weight[m, b] = np.nan_to_num(group[0].margin, nan=0.0), 1
        probability[m, b], order[m, b] = np.nan_to_num(group[0].probability, nan=1.0), number
        for h, unit in enumerate(group):
            (chosen_row, rejected_row), (chosen_end, rejected_end) = placed.row[0, number * units + h], ends[number, h]
            here = row_in_micro[chosen_row], chosen_end, row_in_micro[rejected_row], rejected_end
            slots[:, m, b * units + h], ranks[:, m, b * units + h] = here, unit.ranks
    return RowBatch(*arrays, *slots, margin, weight, probability, order, *(ranks if width else ()))


def _fill(groups: Sequence, units: int, placed: Placement, shape: RowShape, pad_id: int) -> tuple[np.ndarray, ...]:
    """(tokens, positions, first_key, last_key) as int32[4, rows, L], and the columns of the last tokens [B, H, 2]."""
    arrays = np.zeros((4, *shape), np.int32)
    arrays[0], arrays[2:] = pad_id, np.arange(shape.length)
    ends = np.zeros((len(groups), units, 2), np.int64)
    for number, group in enumerate(groups):
        for h, pair in enumerate(group):
            at = number * units + h
            rows, columns = placed.row[0, at], placed.column[0, at]
            if placed.alone[0, at]:
                for side, ids in enumerate((pair.chosen, pair.rejected)):
                    segment, (_, end) = _segment(ids, ids, len(ids))
                    ends[number, h, side] = columns[side] + end
                    _write(arrays, segment, rows[side], columns[side])
            else:
                segment, both_ends = _segment(pair.chosen, pair.rejected, pair.prompt_length)
                ends[number, h] = columns + both_ends
                _write(arrays, segment, rows[0], columns[0])
    return arrays, ends


def _write(arrays: np.ndarray, segment: np.ndarray, row: int, column: int) -> None:
    """Writes one segment into its row; its key columns count from the segment's start."""
    span = slice(column, column + segment.shape[1])
    arrays[:2, row, span], arrays[2:, row, span] = segment[:2], segment[2:] + column


def pair_lengths(pairs: Sequence) -> np.ndarray:
    """int64[pairs, 3]: tokens of the chosen continuation, of the prompt, of the rejected continuation."""
    shared = np.array([pair.prompt_length for pair in pairs], np.int64)
    chosen = np.array([len(pair.chosen) for pair in pairs], np.int64)
    rejected = np.array([len(pair.rejected) for pair in pairs], np.int64)
    return np.stack([chosen - shared, shared, rejected - shared], axis=-1)


def group_lengths(groups: Sequence[Sequence], units: int) -> np.ndarray:
    """int64[groups, units, 3]: the same of each unit, zeros where a group has no such unit."""
    lengths = np.zeros((len(groups), units, 3), np.int64)
    for number, group in enumerate(groups):
        lengths[number, : len(group)] = pair_lengths(group)
    return lengths


def _segment(chosen: np.ndarray, rejected: np.ndarray, prompt: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(tokens, positions, first_key, last_key) of one pair, int[4, c + p + r], and the columns of its two last tokens.

    Either continuation may be empty: that side's last token is then the prompt's last.
    """
    c, r = len(chosen) - prompt, len(rejected) - prompt
    column = np.arange(c + prompt + r)
    reversed_part = column < c
    tokens = np.concatenate([chosen[prompt:][::-1], rejected])
    positions = np.where(reversed_part, prompt + c - 1 - column, column - c)
    first_key = np.where(reversed_part, column, c)
    last_key = np.where(reversed_part, c + prompt - 1, column)
    return np.stack([tokens, positions, first_key, last_key]), (0 if c else prompt - 1, c + prompt + r - 1)


def _deal(arrays: np.ndarray, *, micro_batches: int, row_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals each micro-batch's rows to its groups, the busiest first, in snake order.

    Returns the arrays as int32[4, M, R, L] and, for every row as `place` numbers them, its place in its micro-batch.
    """
    rows = arrays.shape[1]
    rank_to_group = np.arange(rows // micro_batches) % (2 * row_groups)
    rank_to_group = np.minimum(rank_to_group, 2 * row_groups - 1 - rank_to_group)
    keys_seen = (arrays[3] - arrays[2] + 1).sum(axis=1, dtype=np.int64)
    source = np.empty((micro_batches, rows // micro_batches), np.int64)
    for m in range(micro_batches):
        mine = np.arange(m, rows, micro_batches)
        busiest_first = mine[np.argsort(-keys_seen[mine], kind="stable")]
        source[m] = busiest_first[np.argsort(rank_to_group, kind="stable")]
    row_in_micro = np.empty(rows, np.int64)
    row_in_micro[source] = np.arange(rows // micro_batches)
    return arrays[:, source], row_in_micro
