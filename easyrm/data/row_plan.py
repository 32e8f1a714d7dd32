"""Which few row shapes a run compiles: all lengths are known beforehand, so the shapes are fitted to the batches.

Every batch fits one of the shapes. A shape is a row count, a multiple of micro_batches * row_groups, and a row length.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from easyrm.data.placement import RowShape, place
from easyrm.errors import InputError

_LEVELS = 32  # capacities that are tried between the smallest batch and the largest
_SAMPLE = 512  # batches that the choice is made on; that everything fits is checked on all
_CHUNK = 2048  # batches placed at once
_NEARLY = 1.03  # computed tokens, times the fewest, that a shorter row may cost


def plan_shapes(
    store,
    batches: Iterable[np.ndarray],
    *,
    row_length: int,
    max_length: int,
    batch_size: int,
    micro_batches: int,
    row_groups: int,
    packing: bool,
    width: int = 1,
    max_shapes: int = 4,
) -> list[RowShape]:
    """At most `max_shapes` shapes, smallest first, with the fewest computed tokens found over the run's batches.

    `batches` are arrays of indices into the store, whose groups have at most `width` units (1: pairs). `row_length` is
    the longest row allowed, 0 to choose it: then the shortest one wins whose computed tokens are within 3 % of the
    fewest, since attention costs less there. Raises InputError if a kept conversation is longer than a given
    `row_length`.
    """
    multiple = micro_batches * row_groups
    if not packing:
        rows_a_micro = 2 * width * -(-batch_size // micro_batches)
        return [RowShape(micro_batches * _up(rows_a_micro, row_groups), _up(max_length, 8))]
    lengths = _lengths(store, batches, batch_size)
    longest_side = int((lengths[..., 1] + np.maximum(lengths[..., 0], lengths[..., 2])).max())
    if row_length and row_length < longest_side:
        raise InputError(
            f"--data.row_length={row_length} is shorter than the longest conversation, {longest_side} tokens; "
            f"use at least {_up(longest_side, 128)}, or 0 to have it chosen"
        )
    unit = 8 if row_length % 128 or max_length < 128 else 128
    plans = [
        _plan(lengths, limit, unit, multiple, micro_batches, max_shapes)
        for limit in ([row_length] if row_length else _row_lengths(lengths, longest_side, unit))
    ]
    fewest = min(computed for computed, _ in plans)
    return next(shapes for computed, shapes in plans if computed <= _NEARLY * fewest)


def choose_shape(shapes: Sequence[RowShape], lengths: np.ndarray, *, micro_batches: int, packing: bool) -> RowShape:
    """The cheapest shape that the pairs fit; `lengths` as PairStore gives them. Raises ValueError if none does."""
    for shape in sorted(shapes, key=_cost):
        if place(lengths[None], shape, micro_batches=micro_batches, packing=packing).fits[0]:
            return shape
    raise ValueError(f"a batch of {len(lengths)} pairs, {lengths.sum()} tokens, fits none of the shapes {list(shapes)}")


def _up(value: int, unit: int) -> int:
    return -(-int(value) // unit) * unit


def _cost(shape: RowShape) -> tuple[int, int]:
    return shape.capacity, shape.length


def _lengths(store, batches: Iterable[np.ndarray], batch_size: int) -> np.ndarray:
    """int32[batches, batch_size, 3], of groups [batches, batch_size, H, 3]; a short batch is filled with zeros."""
    rows = []
    for indices in batches:
        found = store.lengths(indices)
        lengths = np.zeros((batch_size, *found.shape[1:]), np.int32)
        lengths[: len(indices)] = found
        rows.append(lengths)
    return np.stack(rows)


def _totals(lengths: np.ndarray) -> np.ndarray:
    """int64[batches]: unique tokens."""
    return lengths.reshape(len(lengths), -1).sum(axis=1, dtype=np.int64)


def _row_lengths(lengths: np.ndarray, longest_side: int, unit: int) -> list[int]:
    """Row lengths worth trying: what the longest side and the longest pair need, and powers of two up to a batch."""
    longest_pair = int(lengths.sum(axis=-1).max())
    whole_batch = int(_totals(lengths).max())
    powers = [2**k for k in range(7, 15) if longest_side <= 2**k <= max(2 * longest_pair, 4096)]
    exact = [_up(longest_side, unit), _up(longest_pair, unit)]
    return sorted({*exact, *(power for power in powers if power <= _up(whole_batch, unit))})


def _plan(lengths, limit: int, unit: int, multiple: int, micro_batches: int, max_shapes: int):
    """(computed tokens over the sample, shapes) for rows of at most `limit` tokens."""
    totals = _totals(lengths)
    # The batches hardest to fit come first, so that a shape too small is seen at once.
    lengths = lengths[np.argsort(-totals, kind="stable")]
    largest = _smallest_for_all(lengths, limit, unit, multiple, micro_batches)
    sample = lengths[np.linspace(0, len(lengths) - 1, min(len(lengths), _SAMPLE)).astype(int)]
    candidates = {largest}
    for capacity in np.linspace(totals.min(), largest.capacity, _LEVELS):
        rows = _up(-(-capacity // limit), multiple)
        candidates.add(RowShape(rows, min(limit, _up(-(-capacity // rows), unit))))
    candidates = sorted((shape for shape in candidates if shape.capacity < largest.capacity), key=_cost)
    costs = np.full((len(candidates) + 1, len(sample)), largest.capacity)
    for cost, shape in zip(costs, candidates, strict=False):
        cost[place(sample, shape, micro_batches=micro_batches).fits] = shape.capacity
    choices = itertools.combinations(range(len(candidates)), min(max_shapes - 1, len(candidates)))
    totals = {choice: int(costs[[*choice, -1]].min(axis=0).sum()) for choice in choices}
    best = min(totals, key=totals.get)
    used = {candidates[i] for i in best if (costs[[*best, -1]].min(axis=0) == candidates[i].capacity).any()}
    return totals[best], [*sorted(used, key=_cost), largest]


def _smallest_for_all(lengths: np.ndarray, limit: int, unit: int, multiple: int, micro_batches: int) -> RowShape:
    """The fewest rows that hold every batch, then the shortest such rows."""

    def all_fit(shape: RowShape) -> bool:
        chunks = (lengths[start : start + _CHUNK] for start in range(0, len(lengths), _CHUNK))
        return all(place(chunk, shape, micro_batches=micro_batches).fits.all() for chunk in chunks)

    rows = _up(-(-lengths[0].sum() // limit), multiple)
    while not all_fit(RowShape(rows, limit)):
        rows += multiple
    length = limit
    while length > unit and all_fit(RowShape(rows, length - unit)):
        length -= unit
    return RowShape(rows, length)
