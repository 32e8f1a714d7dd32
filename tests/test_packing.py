"""Packing against a brute-force oracle that knows conversations, not intervals."""

from typing import NamedTuple

import numpy as np
import pytest

from easyrm.data.packing import RowShape, pack, pair_lengths, place
from easyrm.data.row_plan import choose_shape, plan_shapes
from easyrm.errors import InputError

PAD = 7


class Sides(NamedTuple):
    chosen: np.ndarray
    rejected: np.ndarray
    prompt_length: int
    margin: float
    probability: float = float("nan")
    ranks: tuple[int, int] = (0, 1)


class Lengths:
    """Stands in for a PairStore where only lengths are asked for."""

    def __init__(self, lengths):
        self.all = np.array(lengths)

    def lengths(self, indices):
        return self.all[indices]


def make_pairs(lengths, margin=float("nan")):
    """Pairs with these (c, p, r), every token id of the batch unique."""
    ids = iter(range(100, 10**6))
    pairs = []
    for c, p, r in lengths:
        prompt, chosen, rejected = ([next(ids) for _ in range(n)] for n in (p, c, r))
        pairs.append(Sides(np.array(prompt + chosen), np.array(prompt + rejected), p, margin))
    return pairs


def random_lengths(seed, n, longest=20):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, (n, 3))
    lengths[rng.random((n, 3)) < 0.15] = 0
    empty_side = lengths[:, 1] + lengths[:, [0, 2]].min(axis=1) == 0
    lengths[empty_side, 1] = 1
    return [tuple(map(int, row)) for row in lengths]


def check_against_oracle(pairs, batch):
    """Every token sees exactly its own conversation up to itself, at its own position; padding sees itself only."""
    unused = np.ones(batch.tokens.shape, bool)
    reached = []
    for m, b in np.argwhere(batch.weight > 0):
        ends = [
            (batch.chosen_row[m, b], batch.chosen_column[m, b]),
            (batch.rejected_row[m, b], batch.rejected_column[m, b]),
        ]
        sides = []
        for row, end in ends:
            keys = slice(batch.first_key[m, row, end], batch.last_key[m, row, end] + 1)
            by_position = np.argsort(batch.positions[m, row, keys], kind="stable")
            assert batch.positions[m, row, keys][by_position].tolist() == list(range(len(by_position)))
            columns = keys.start + by_position
            for count, column in enumerate(columns, 1):
                seen = range(batch.first_key[m, row, column], batch.last_key[m, row, column] + 1)
                assert sorted(seen) == sorted(columns[:count])
            unused[m, row, columns] = False
            sides.append(tuple(batch.tokens[m, row, columns].tolist()))
        reached.append(tuple(sides))
    assert sorted(reached) == sorted((tuple(p.chosen.tolist()), tuple(p.rejected.tolist())) for p in pairs)
    assert (batch.tokens[unused] == PAD).all()
    assert (batch.positions[unused] == 0).all()
    own = np.broadcast_to(np.arange(batch.tokens.shape[2]), batch.tokens.shape)
    for key in (batch.first_key, batch.last_key):
        assert (key[unused] == own[unused]).all()


def pack_all(pairs, shape, micro_batches=1, row_groups=1, packing=True, batch_size=None):
    return pack(
        pairs,
        shape,
        micro_batches=micro_batches,
        pad_id=PAD,
        packing=packing,
        batch_size=batch_size or len(pairs),
        row_groups=row_groups,
    )


EDGES = {
    "no common prefix": [(4, 0, 3)],
    "chosen is a prefix of rejected": [(0, 5, 2)],
    "rejected is a prefix of chosen": [(3, 5, 0)],
    "one conversation twice": [(0, 6, 0)],
    "a row exactly full": [(20, 7, 13), (1, 1, 1), (10, 17, 10)],
    "single tokens": [(1, 0, 1), (0, 1, 1), (1, 1, 0)],
    "longer than a row, each side fits": [(30, 10, 5), (8, 30, 7), (2, 38, 1), (1, 1, 1)],
    "two full sides without a prefix": [(40, 0, 40)],
}


@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES.keys())
def test_visible_keys_of_edge_cases(lengths):
    pairs = make_pairs(lengths)
    check_against_oracle(pairs, pack_all(pairs, RowShape(6, 40)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("micro_batches", "row_groups"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("packing", [True, False])
def test_visible_keys_of_random_pairs(seed, micro_batches, row_groups, packing):
    lengths = random_lengths(seed, 20)  # with rows of 40, some pairs need two lone segments
    pairs = make_pairs(lengths)
    shapes = plan_shapes(
        Lengths(lengths),
        [np.arange(20)],
        row_length=40,
        max_length=40,
        batch_size=20,
        micro_batches=micro_batches,
        row_groups=row_groups,
        packing=packing,
    )
    assert all(shape.rows % (micro_batches * row_groups) == 0 for shape in shapes)
    shape = choose_shape(shapes, np.array(lengths), micro_batches=micro_batches, packing=packing)
    batch = pack_all(pairs, shape, micro_batches, row_groups, packing, batch_size=24)
    check_against_oracle(pairs, batch)
    assert batch.weight.shape == (micro_batches, 24) and batch.weight.sum() == 20
    assert batch.tokens.size == shape.capacity
    for unused in (batch.chosen_row, batch.chosen_column, batch.rejected_row, batch.rejected_column, batch.margin):
        assert (unused[batch.weight == 0] == 0).all()


def test_packing_is_deterministic_and_margins_follow_their_pair():
    pairs = [pair._replace(margin=float(i)) for i, pair in enumerate(make_pairs(random_lengths(5, 12)))]
    shape = RowShape(12, 48)
    first, second = pack_all(pairs, shape, 2, 3), pack_all(pairs, shape, 2, 3)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for m, b in np.argwhere(first.weight > 0):
        last = first.tokens[m, first.chosen_row[m, b], first.chosen_column[m, b]]
        assert pairs[int(first.margin[m, b])].chosen[-1] == last


@pytest.mark.parametrize("packing", [True, False])
def test_no_pairs_make_rows_of_padding(packing):
    batch = pack_all([], RowShape(8, 16), 2, 2, packing, batch_size=4)
    check_against_oracle([], batch)
    assert batch.tokens.shape == (2, 4, 16) and batch.weight.shape == (2, 4) and not batch.weight.any()


def test_absent_margin_is_zero():
    pairs = make_pairs([(1, 2, 3)])
    assert (pack_all(pairs, RowShape(1, 8)).margin == 0).all()


def test_groups_see_about_the_same_number_of_keys():
    pairs = make_pairs(random_lengths(1, 128, longest=40))
    batch = pack_all(pairs, RowShape(96, 96), micro_batches=2, row_groups=4)
    seen = (batch.last_key - batch.first_key + 1).sum(axis=2).reshape(2, 4, -1).sum(axis=2)
    assert (seen.max(axis=1) < 1.1 * seen.mean(axis=1)).all()


def test_lone_sides_stay_in_one_micro_batch_even_when_room_is_short():
    pairs = make_pairs([(10, 25, 12), (9, 26, 9), (10, 20, 15), (4, 30, 8)])
    batch = pack_all(pairs, RowShape(8, 40), micro_batches=4)
    check_against_oracle(pairs, batch)
    assert (batch.weight.sum(axis=1) == 1).all()
    with pytest.raises(ValueError, match="do not fit"):
        pack_all(pairs, RowShape(8, 40), micro_batches=8)


def test_batches_placed_together_are_placed_as_alone():
    lengths = np.array([random_lengths(seed, 15) for seed in range(30)])
    shape = RowShape(12, 40)
    together = place(lengths, shape, micro_batches=2)
    for i, one in enumerate(lengths):
        alone = place(one[None], shape, micro_batches=2)
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[i], single[0])
    assert together.fits.any() and not together.fits.all()


@pytest.mark.parametrize("row_length", [0, 256, 1000])
@pytest.mark.parametrize(("micro_batches", "row_groups"), [(1, 1), (2, 4)])
def test_every_batch_fits_a_planned_shape(row_length, micro_batches, row_groups):
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(3.5, 1.0, (3000, 3)).astype(int) + 1, 120)
    batches = [*np.arange(2976).reshape(-1, 32), np.arange(2976, 3000)]
    settings = {"micro_batches": micro_batches, "packing": True}
    shapes = plan_shapes(
        Lengths(lengths),
        batches,
        row_length=row_length,
        max_length=256,
        batch_size=32,
        row_groups=row_groups,
        **settings,
    )
    assert len(shapes) <= 4
    computed = 0
    for batch in batches:
        shape = choose_shape(shapes, lengths[batch], **settings)
        assert shape.rows % (micro_batches * row_groups) == 0
        assert not row_length or shape.length <= row_length
        computed += shape.capacity
    assert computed < (1.10 if row_groups == 1 and row_length != 256 else 1.45) * lengths.sum()
    with pytest.raises(ValueError, match="fits none"):
        choose_shape(shapes, np.full((32, 3), 250), **settings)


def test_a_row_shorter_than_a_conversation_is_refused():
    with pytest.raises(InputError, match=r"row_length=64 .* 90 tokens; use at least 128, or 0"):
        plan_shapes(
            Lengths([(10, 80, 5)]),
            [np.arange(1)],
            row_length=64,
            max_length=100,
            batch_size=1,
            micro_batches=1,
            row_groups=1,
            packing=True,
        )


def test_unpacked_rows_hold_one_side_each():
    pairs = make_pairs(random_lengths(3, 8))
    (shape,) = plan_shapes(
        None, [], row_length=0, max_length=42, batch_size=8, micro_batches=2, row_groups=4, packing=False
    )
    assert shape == RowShape(16, 48)
    batch = pack_all(pairs, shape, 2, 4, packing=False)
    check_against_oracle(pairs, batch)
    ends = [[len(pair.chosen) - 1 for pair in pairs[m::2]] for m in range(2)]
    np.testing.assert_array_equal(batch.chosen_column[:, :4], ends)


def test_pair_lengths():
    lengths = random_lengths(2, 9)
    np.testing.assert_array_equal(pair_lengths(make_pairs(lengths)), lengths)
