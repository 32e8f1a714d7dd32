"""Where the segments of a batch go: the rows they share, so that few tokens are computed and each row is full.

N batches, S pairs a batch, B groups a batch, H units a group, M micro-batches, R rows a micro-batch.
"""

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


class Placement(NamedTuple):
    """Where each pair goes; a pair in two lone segments has two places, a shared one twice the same.

    Row k of a batch is row k // M of micro-batch k % M.
    """

    row: np.ndarray  # int[N, S, 2]: chosen's, rejected's
    column: np.ndarray  # int[N, S, 2]
    alone: np.ndarray  # bool[N, S]: the sides do not share their prompt
    fits: np.ndarray  # bool[N]


def place(lengths: np.ndarray, shape: RowShape, *, micro_batches: int, packing: bool = True) -> Placement:
    """First-fit-decreasing of every pair of N batches at once; lengths are int[N, S, 3], or int[N, B, H, 3] of groups.

    A pair is (chosen continuation, prompt, rejected continuation); all zeros stand for no pair. Pairs whose shared
    segment is longer than a row become two lone sequences in one micro-batch. Without packing each side has a row.
    The units of a group, S = B * H of them in a batch, are like pairs that lie in one micro-batch.
    """
    if lengths.ndim == 4:
        return _place_groups(lengths, shape, micro_batches, packing)
    chosen, prompt, rejected = np.moveaxis(lengths.astype(np.int64), -1, 0)
    if not packing:
        return _place_unpacked(chosen + prompt, prompt, prompt + rejected, shape, micro_batches)
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


def _place_unpacked(chosen, prompt, rejected, shape: RowShape, micro_batches: int) -> Placement:
    """Pair s is in micro-batch s % M, its sides in two rows of their own; of one conversation twice, in one of them.

    The three lengths are int[N, S], sides with their prompt.
    """
    s = np.broadcast_to(np.arange(chosen.shape[1]), chosen.shape)
    row = (2 * (s // micro_batches)[..., None] + np.arange(2)) * micro_batches + (s % micro_batches)[..., None]
    exists = np.maximum(chosen, rejected)
    last_row = np.where(exists[..., None] > 0, row, 0).max(axis=(1, 2), initial=0)
    fits = (exists.max(axis=1, initial=0) <= shape.length) & (last_row < shape.rows)
    one_conversation = (chosen == prompt) & (rejected == prompt)
    row = np.where(one_conversation[..., None], row[..., :1], row)
    return Placement(row, np.zeros_like(row), ~one_conversation, fits)


def _place_groups(lengths: np.ndarray, shape: RowShape, micro_batches: int, packing: bool) -> Placement:
    """Whole groups are dealt to the micro-batches, the largest first, in snake order; then each is filled by itself."""
    batches, groups, units, _ = lengths.shape
    if units == 1 or micro_batches == 1:
        flat = lengths.reshape(batches, -1, 3)
        return place(flat, shape, micro_batches=micro_batches, packing=packing)
    lengths = np.pad(lengths, ((0, 0), (0, -groups % micro_batches), (0, 0), (0, 0)))
    dealt = np.argsort(-lengths.sum(axis=(2, 3)), axis=1, kind="stable").reshape(batches, -1, micro_batches)
    dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
    dealt = dealt.transpose(0, 2, 1)  # [N, M, groups a micro-batch]
    batch = np.arange(batches)[:, None, None]
    inside = RowShape(shape.rows // micro_batches, shape.length)
    alone = lengths[batch, dealt].reshape(batches * micro_batches, -1, 3)
    placed = place(alone, inside, micro_batches=1, packing=packing)

    def back(found: np.ndarray) -> np.ndarray:
        result = np.empty((*lengths.shape[:3], *found.shape[2:]), found.dtype)
        result[batch, dealt] = found.reshape(*dealt.shape, units, *found.shape[2:])
        return result[:, :groups].reshape(batches, groups * units, *found.shape[2:])

    micro = np.tile(np.arange(micro_batches), batches)[:, None, None]
    row = placed.row * micro_batches + micro
    fits = placed.fits.reshape(batches, micro_batches).all(axis=1)
    return Placement(back(row), back(placed.column), back(placed.alone), fits)
