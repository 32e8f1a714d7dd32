"""Pairs into rows: the layout in which every token's visible keys are one interval of its row.

A pair is laid out once as [chosen continuation, reversed | prompt | rejected continuation]. Positions say where a token
stands in its own conversation; attention does not care in which order keys are stored.

N batches, S pairs a batch, M micro-batches, R rows a micro-batch, L row length, B pair slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RowShape(NamedTuple):
    """Rows of one optimizer step, all micro-batches together, and their length in tokens."""

    rows: int
    length: int

    @property
    def capacity(self) -> int:
        """Tokens computed in one step."""
        return self.rows * self.length


class RowBatch(NamedTuple):
    """One optimizer batch as arrays, a pytree.

    A token sees the columns first_key..last_key (both included) of its row; a padding token only itself. The last token
    of slot b's chosen side stands at (chosen_row, chosen_column)[m, b] of micro-batch m. Unused slots have weight 0 and
    point at (0, 0). An absent margin is 0.
    """

    tokens: np.ndarray  # int32[M, R, L], as the next three
    positions: np.ndarray
    first_key: np.ndarray
    last_key: np.ndarray
    chosen_row: np.ndarray  # int32[M, B], as the next three
    chosen_column: np.ndarray
    rejected_row: np.ndarray
    rejected_column: np.ndarray
    margin: np.ndarray  # float32[M, B], as weight
    weight: np.ndarray


class Placement(NamedTuple):
    """Where each pair goes; a pair in two lone segments has two places, a shared one twice the same.

    Row k of a batch is row k // M of micro-batch k % M.
    """

    row: np.ndarray  # int[N, S, 2]: chosen's, rejected's
    column: np.ndarray  # int[N, S, 2]
    alone: np.ndarray  # bool[N, S]: the sides do not share their prompt
    fits: np.ndarray  # bool[N]


def place(lengths: np.ndarray, shape: RowShape, *, micro_batches: int, packing: bool = True) -> Placement:
    """First-fit-decreasing of every pair of N batches at once; lengths are int[N, S, 3].

    A pair is (chosen continuation, prompt, rejected continuation); all zeros stand for no pair. Pairs whose shared
    segment is longer than a row become two lone sequences in one micro-batch. Without packing each side has a row.
    """
    chosen, prompt, rejected = np.moveaxis(lengths.astype(np.int64), -1, 0)
    if not packing:
        return _place_unpacked(chosen + prompt, prompt + rejected, shape, micro_batches)
    shared = chosen + prompt + rejected
    alone = shared > shape.length
    sides = np.stack([chosen + prompt, prompt + rejected], axis=-1)
    row, column = np.zeros_like(sides), np.zeros_like(sides)
    free = np.full((len(lengths), shape.rows // micro_batches, micro_batches), shape.length)
    fits = np.ones(len(lengths), bool)
    # Lone sides first: they are the longest, and they alone are bound to one micro-batch.
    order = np.argsort(-np.where(alone, 2 * shape.length + sides.max(-1), shared), axis=1, kind="stable")
    for rank in range(alone.sum(axis=1).max(initial=0)):
        batch = np.flatnonzero(alone.sum(axis=1) > rank)
        pair = order[batch, rank]
        shorter = sides[batch, pair, 1] < sides[batch, pair, 0]
        for slot, room in zip(
            (1 - shorter, 1 * shorter), _take_two(free, batch, sides[batch, pair], fits), strict=True
        ):
            row[batch, pair, slot], column[batch, pair, slot] = room[0], shape.length - room[1]
    flat, everyone = free.reshape(len(lengths), -1), np.arange(len(lengths))
    for rank in range(lengths.shape[1]):
        pair = order[:, rank]
        need = np.where(alone[everyone, pair], 0, shared[everyone, pair])
        open_rows = flat >= need[:, None]
        first = open_rows.argmax(axis=1)
        fits &= open_rows[everyone, first]
        mine = np.flatnonzero(need)
        row[mine, pair[mine]] = first[mine, None]
        column[mine, pair[mine]] = shape.length - flat[mine, first[mine], None]
        flat[everyone, first] -= need
    return Placement(row, column, alone, fits)


def _take_two(free: np.ndarray, batch: np.ndarray, sides: np.ndarray, fits: np.ndarray):
    """Takes, in each of the batches, room for two lone sides in two rows of the micro-batch with the most room.

    (Sides that are too long for a row as one shared segment can never share it as two.) Returns (row, tokens that were
    free in it) of the longer and of the shorter side; `free` and `fits` are updated.
    """
    room, needs = free[batch], [sides.max(-1), sides.min(-1)]  # [n, R, M]
    picks, possible = [], True
    for need in needs:
        open_rows = room >= need[:, None, None]
        picks.append(open_rows.argmax(axis=1))
        possible = possible & open_rows.any(axis=1)
        np.put_along_axis(room, picks[-1][:, None], -1, axis=1)
    micro = np.where(possible, free[batch].sum(axis=1), -1).argmax(axis=1)
    n = np.arange(len(batch))
    fits[batch] &= possible[n, micro]
    taken = []
    for need, pick in zip(needs, picks, strict=True):
        row = pick[n, micro]
        taken.append((row * free.shape[2] + micro, free[batch, row, micro]))
        free[batch, row, micro] -= need
    return taken


def _place_unpacked(chosen: np.ndarray, rejected: np.ndarray, shape: RowShape, micro_batches: int) -> Placement:
    """Pair s is in micro-batch s % M, its sides in two rows of their own."""
    s = np.broadcast_to(np.arange(chosen.shape[1]), chosen.shape)
    row = (2 * (s // micro_batches)[..., None] + np.arange(2)) * micro_batches + (s % micro_batches)[..., None]
    exists = np.maximum(chosen, rejected)
    last_row = np.where(exists[..., None] > 0, row, 0).max(axis=(1, 2), initial=0)
    fits = (exists.max(axis=1, initial=0) <= shape.length) & (last_row < shape.rows)
    return Placement(row, np.zeros_like(row), np.ones(chosen.shape, bool), fits)


def pack(
    pairs: Sequence,
    shape: RowShape,
    *,
    micro_batches: int,
    pad_id: int,
    packing: bool,
    batch_size: int,
    row_groups: int = 1,
) -> RowBatch:
    """Lays out up to `batch_size` pairs (with `chosen`, `rejected`, `prompt_length`, `margin`) in rows of `shape`.

    Deterministic. The rows of a micro-batch are dealt to `row_groups` equal, contiguous groups so that each sees about
    the same number of keys. Raises ValueError if the pairs do not fit: shapes come from `row_plan`, where they do.
    """
    lengths = pair_lengths(pairs)
    placed = place(lengths[None], shape, micro_batches=micro_batches, packing=packing)
    if len(pairs) > batch_size or not placed.fits[0]:
        raise ValueError(f"{len(pairs)} pairs (batch_size={batch_size}) do not fit {shape}")
    arrays, ends = _fill(pairs, placed, shape, pad_id)
    arrays, row_in_micro = _deal(arrays, micro_batches=micro_batches, row_groups=row_groups)
    slots = np.zeros((4, micro_batches, batch_size), np.int32)
    margin, weight = np.zeros((2, micro_batches, batch_size), np.float32)
    used = [0] * micro_batches
    for pair, (chosen_row, rejected_row), (chosen_end, rejected_end) in zip(pairs, placed.row[0], ends, strict=True):
        m = chosen_row % micro_batches
        b, used[m] = used[m], used[m] + 1
        slots[:, m, b] = row_in_micro[chosen_row], chosen_end, row_in_micro[rejected_row], rejected_end
        margin[m, b], weight[m, b] = np.nan_to_num(pair.margin, nan=0.0), 1
    return RowBatch(*arrays, *slots, margin, weight)


def _fill(pairs: Sequence, placed: Placement, shape: RowShape, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions, first_key, last_key) as int32[4, rows, L], and the columns of the two last tokens [S, 2]."""
    arrays = np.zeros((4, *shape), np.int32)
    arrays[0], arrays[2:] = pad_id, np.arange(shape.length)
    ends = np.empty((len(pairs), 2), np.int64)
    for i, pair in enumerate(pairs):
        rows, columns = placed.row[0, i], placed.column[0, i]
        if placed.alone[0, i]:
            for side, ids in enumerate((pair.chosen, pair.rejected)):
                segment, (_, end) = _segment(ids, ids, len(ids))
                ends[i, side] = columns[side] + end
                _write(arrays, segment, rows[side], columns[side])
        else:
            segment, both_ends = _segment(pair.chosen, pair.rejected, pair.prompt_length)
            ends[i] = columns + both_ends
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
