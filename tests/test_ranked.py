"""The losses of ranked responses against brute force, and through packed rows against separate sequences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import VARIANTS, random_model

from easyrm.data.packing import RowBatch, RowShape, pack
from easyrm.data.placement import place
from easyrm.data.row_plan import choose_shape, plan_shapes
from easyrm.data.store import TokenPair
from easyrm.models.attention.blockwise import blockwise_attention
from easyrm.models.llama import Kernels
from easyrm.training.loss import LossConfig, pair_losses
from easyrm.training.ranked import compare, record_losses
from easyrm.training.step import Forward, TrainState, make_train_step, reward_statistics

# Ranks of groups of two to seven responses, some with ties, some worst first.
RANKS = [
    (0, 1),
    (1, 0),
    (0, 1, 2),
    (2, 0, 1),
    (0, 0, 1),
    (0, 1, 1),
    (0, 1, 2, 3),
    (1, 0, 1, 2, 0),
    (6, 5, 4, 3, 2, 1, 0),
]
FORWARD = Forward(jnp.float32, Kernels(blockwise_attention), "none", lambda x: x)


def slots_of(rewards, all_ranks, batch_size):
    """(batch without rows, rewards of both sides) of groups in the first slots of `batch_size`."""
    width = max(-(-len(ranks) // 2) for ranks in all_ranks)
    sides = np.full((1, batch_size, width, 2), 77.0, np.float32)  # what unused slots hold is noise
    marks = np.full(sides.shape, -1, np.int32)
    for b, (values, ranks) in enumerate(zip(rewards, all_ranks, strict=True)):
        for i, (value, rank) in enumerate(zip(values, ranks, strict=True)):
            sides[0, b, i // 2, i % 2], marks[0, b, i // 2, i % 2] = value, rank
    weight = np.float32([[b < len(rewards) for b in range(batch_size)]])
    chosen, rejected, *marks = (x.reshape(1, -1) for x in (sides[..., 0], sides[..., 1], marks[..., 0], marks[..., 1]))
    rows = RowBatch(*[None] * 8, 0 * weight, weight, 0 * weight + 1, None, *marks)
    return rows, chosen, rejected


def pairs_of(ranks):
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def oracle(config, rewards, ranks):
    """One group's loss in float64, by loops."""
    pairs = pairs_of(ranks)
    if config.type == "all_pairs":
        total = 0.0
        for i, j in pairs:
            says = 1 / (1 + math.exp(rewards[j] - rewards[i] + config.constant_margin))
            total -= (1 - config.label_smoothing) * math.log(says) + config.label_smoothing * math.log(1 - says)
    else:
        stages = []
        for i, reward in enumerate(rewards):
            worse = [math.exp(other) for other, rank in zip(rewards, ranks, strict=True) if rank > ranks[i]]
            if worse:
                stages.append(-math.log(math.exp(reward) / (math.exp(reward) + sum(worse))))
        total = sum(stages) / len(stages) * len(pairs)
    total += config.center_coef * sum((rewards[i] + rewards[j]) ** 2 for i, j in pairs)
    return total / len(pairs)


CONFIGS = [
    {"type": "all_pairs"},
    {"type": "all_pairs", "label_smoothing": 0.1},
    {"type": "all_pairs", "constant_margin": 0.6, "center_coef": 0.02},
    {"type": "plackett_luce"},
    {"type": "plackett_luce", "center_coef": 0.02},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_losses_and_gradients_equal_brute_force(settings):
    config, rng = LossConfig(**settings), np.random.default_rng(1)
    config.validate()
    rewards = [2 * rng.normal(size=len(ranks)) for ranks in RANKS]
    rows, chosen, rejected = slots_of(rewards, RANKS, len(RANKS) + 2)
    found = np.asarray(record_losses(config, rows, chosen, rejected))
    expected = [oracle(config, *group) for group in zip(rewards, RANKS, strict=True)]
    np.testing.assert_allclose(found[0, : len(RANKS)], expected, rtol=1e-5)

    def total(chosen, rejected):
        return jnp.sum(record_losses(config, rows, chosen, rejected) * rows.weight)

    gradients = np.stack(jax.grad(total, (0, 1))(chosen, rejected), axis=-1).reshape(len(RANKS) + 2, -1)
    assert np.isfinite(gradients).all() and not gradients[len(RANKS) :].any()
    for b, (values, ranks) in enumerate(zip(rewards, RANKS, strict=True)):
        numeric = []
        for moved in np.eye(len(ranks)) * 1e-6:
            numeric.append((oracle(config, values + moved, ranks) - oracle(config, values - moved, ranks)) / 2e-6)
        np.testing.assert_allclose(gradients[b, : len(ranks)], numeric, rtol=1e-4, atol=1e-5)
        assert not gradients[b, len(ranks) :].any()


def test_every_setting_changes_the_loss():
    rows, chosen, rejected = slots_of([[0.3, -1.0, 0.5]], [(0, 1, 2)], 1)
    found = [float(record_losses(LossConfig(**settings), rows, chosen, rejected)[0, 0]) for settings in CONFIGS]
    assert min(abs(a - b) for a, b in itertools.combinations(found, 2)) > 1e-3


def test_two_responses_give_bradley_terry():
    rng = np.random.default_rng(2)
    rewards = 3 * rng.normal(size=(20, 2))
    rows, chosen, rejected = slots_of(rewards, [(0, 1)] * 20, 20)
    for name in ("all_pairs", "plackett_luce"):
        for center in (0.0, 0.1):
            plain = pair_losses(LossConfig(center_coef=center), chosen, rejected)
            found = record_losses(LossConfig(type=name, center_coef=center), rows, chosen, rejected)
            np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-7)
    plain = reward_statistics(chosen, rejected, rows.weight)
    for name, value in reward_statistics(*compare(rows, chosen, rejected)).items():
        assert float(value) == pytest.approx(float(plain[name]), rel=1e-6), name


def test_the_probabilities_of_all_rankings_sum_to_one():
    """What Plackett-Luce is: a distribution over the k! orders."""
    rewards, total = [0.5, -1.2, 2.0, 0.1], 0.0
    for order in itertools.permutations(range(4)):
        rows, chosen, rejected = slots_of([rewards], [order], 1)
        total += math.exp(-3 * float(record_losses(LossConfig(type="plackett_luce"), rows, chosen, rejected)[0, 0]))
    assert total == pytest.approx(1.0, rel=1e-5)


def test_extreme_rewards_stay_finite():
    rows, chosen, rejected = slots_of([[-1e4, 1e4, 0.0], [1e4, -1e4, 3.0]], [(0, 1, 2), (0, 1, 2)], 2)
    for name in ("all_pairs", "plackett_luce"):
        config = LossConfig(type=name)
        assert np.isfinite(record_losses(config, rows, chosen, rejected)).all()
        gradients = jax.grad(lambda c, config=config: record_losses(config, rows, c, rejected).sum())(chosen)
        assert np.isfinite(gradients).all()


def test_statistics_are_of_groups_of_comparable_pairs():
    """A group counts once, however many comparisons it has; a tie of rewards is wrong."""
    rewards = [[1.0, 2.0, 0.0, 0.0], [3.0, 1.0]]
    rows, chosen, rejected = slots_of(rewards, [(0, 1, 2, 2), (0, 1)], 5)
    found = {name: float(x) for name, x in reward_statistics(*compare(rows, chosen, rejected)).items()}
    better = [1, 1, 1, 2, 2]  # of the first group's comparisons (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)
    worse = [2, 0, 0, 0, 0]
    assert found["accuracy"] == pytest.approx((4 / 5 + 1) / 2)
    assert found["chosen_reward_mean"] == pytest.approx((np.mean(better) + 3) / 2)
    assert found["rejected_reward_mean"] == pytest.approx((np.mean(worse) + 1) / 2)
    assert found["margin"] == pytest.approx((np.mean(np.subtract(better, worse)) + 2) / 2)
    mean = (np.mean(better) + 3) / 2
    variance = (np.mean(np.subtract(better, mean) ** 2) + (3 - mean) ** 2) / 2
    assert found["chosen_reward_std"] == pytest.approx(variance**0.5)


def token_groups(sizes, seed=0):
    """(groups of units, their responses, ranks); the last token of a response occurs nowhere else."""
    rng, groups, responses, all_ranks = np.random.default_rng(seed), [], [], []
    last = itertools.count(60)
    for number, size in enumerate(sizes):
        prompt = rng.integers(1, 60, rng.integers(0, 9), dtype=np.int32)
        some = []
        for _ in range(size):
            some.append(np.r_[prompt, rng.integers(1, 60, rng.integers(0, 9), dtype=np.int32), next(last)].astype(int))
        ranks = tuple(rng.permutation(size).tolist())
        units = []
        for i in range(0, size, 2):
            a, b = some[i], some[min(i + 1, size - 1)]
            n = min(len(a), len(b))
            different = np.flatnonzero(a[:n] != b[:n])
            shared = int(different[0]) if len(different) else n
            units.append(TokenPair(a, b, shared, math.nan, f"group:{number}", ranks=(*ranks[i : i + 2], -1)[:2]))
        groups.append(units)
        responses.append(some)
        all_ranks.append(ranks)
    return groups, responses, all_ranks


SIZES = (4, 3, 2, 7, 5)


class Lengths:
    """Stands in for a PairStore where only lengths are asked for."""

    def __init__(self, groups, width):
        self.all = np.zeros((len(groups), width, 3), int)
        for g, units in enumerate(groups):
            for h, (a, b, shared, *_) in enumerate(units):
                self.all[g, h] = len(a) - shared, shared, len(b) - shared

    def lengths(self, indices):
        return self.all[indices]


def lay_out(groups, *, micro_batches=1, packing=True, row_groups=1, row_length=0, batch_size=7):
    """The batch of `groups` in the shape that is planned for it."""
    width = max(map(len, groups))
    lengths, everything = Lengths(groups, width), np.arange(len(groups))
    layout = {"micro_batches": micro_batches, "packing": packing}
    settings = {"batch_size": batch_size, "row_groups": row_groups, "width": width}
    shapes = plan_shapes(lengths, [everything], row_length=row_length, max_length=32, **layout, **settings)
    shape = choose_shape(shapes, lengths.lengths(everything), **layout)
    return pack(groups, shape, pad_id=0, **layout, **settings)


LAYOUTS = [
    {},
    {"micro_batches": 2},
    {"micro_batches": 3, "row_groups": 2},
    {"packing": False},
    {"packing": False, "micro_batches": 2},
    {"row_length": 24, "micro_batches": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_response_is_computed_once_and_a_group_lies_in_one_micro_batch(layout):
    groups, responses, all_ranks = token_groups(SIZES)
    batch = lay_out(groups, **layout)
    width = max(map(len, groups))
    assert batch.weight.sum() == len(SIZES) and sorted(batch.order[batch.order >= 0]) == list(range(len(SIZES)))
    for token in (response[-1] for some in responses for response in some):
        assert (batch.tokens == token).sum() == 1
    for m, b in np.argwhere(batch.weight > 0):
        some, ranks = responses[batch.order[m, b]], all_ranks[batch.order[m, b]]
        ends, marks = [], []
        for slot in range(b * width, (b + 1) * width):
            for row, column, rank in (
                (batch.chosen_row, batch.chosen_column, batch.chosen_rank),
                (batch.rejected_row, batch.rejected_column, batch.rejected_rank),
            ):
                if rank[m, slot] >= 0:
                    ends.append(batch.tokens[m, row[m, slot], column[m, slot]])
                    marks.append(rank[m, slot])
        assert ends == [response[-1] for response in some] and tuple(marks) == ranks
    assert (batch.chosen_rank.reshape(*batch.weight.shape, width)[batch.weight == 0] == -1).all()
    if layout.get("packing", True):
        real = sum(len(unit.chosen) + len(unit.rejected) - unit.prompt_length for units in groups for unit in units)
        assert (batch.tokens > 0).sum() == real


def test_groups_placed_together_are_placed_as_alone():
    lengths = np.stack([Lengths(token_groups(SIZES, seed)[0], 4).all for seed in range(20)])
    shape = RowShape(12, 32)
    together = place(lengths, shape, micro_batches=3)
    for i, one in enumerate(lengths):
        for whole, single in zip(together, place(one[None], shape, micro_batches=3), strict=True):
            np.testing.assert_array_equal(whole[i], single[0])
    micro = (together.row[..., 0] % 3).reshape(20, len(SIZES), 4)
    real = lengths.any(axis=-1)
    assert together.fits.all() and (np.where(real, micro, micro[:, :, :1]) == micro[:, :, :1]).all()


def step_of(model, batch, config):
    """(metrics, gradients) of one step."""
    optimizer = optax.trace(decay=0.0)  # whose state is the gradient
    state = TrainState(model, optimizer.init(model), jnp.array(True))
    state, metrics = jax.jit(make_train_step(FORWARD, optimizer, config))(state, batch)
    return metrics, state.optimizer.trace


@pytest.mark.parametrize(("name", "layouts"), [("all_pairs", LAYOUTS[2:5:2]), ("plackett_luce", LAYOUTS[:2])])
def test_loss_and_gradients_are_those_of_separate_sequences(name, layouts):
    """Whatever the packing and the micro-batches."""
    model, config = random_model(VARIANTS["gqa"]), LossConfig(type=name, center_coef=0.05)
    groups, responses, all_ranks = token_groups(SIZES)
    flat = [TokenPair(some, some, len(some), math.nan, "") for each in responses for some in each]
    alone = pack(flat, RowShape(len(flat), 32), pad_id=0, batch_size=len(flat))
    alone = jax.tree.map(lambda leaf: leaf[0], alone)  # a row a sequence, or so: each sees itself alone

    def separate(model):
        rewards, _ = FORWARD(model, alone)
        total, at = 0.0, 0
        for ranks in all_ranks:
            mine, at = rewards[at : at + len(ranks)], at + len(ranks)
            order = sorted(range(len(ranks)), key=ranks.__getitem__)
            pairs = list(itertools.combinations(order, 2))
            if name == "all_pairs":
                terms = [-jax.nn.log_sigmoid(mine[i] - mine[j]) for i, j in pairs]
            else:
                terms = [-jax.nn.log_softmax(mine[jnp.array(order[i:])])[0] for i in range(len(order) - 1)]
            total += sum(terms) / len(terms) + 0.05 * sum((mine[i] + mine[j]) ** 2 for i, j in pairs) / len(pairs)
        return total / len(all_ranks)

    expected, expected_gradients = jax.jit(jax.value_and_grad(separate))(model)
    for layout in layouts:
        metrics, gradients = step_of(model, lay_out(groups, **layout), config)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            error = np.linalg.norm(np.ravel(ours - theirs)) / np.linalg.norm(np.ravel(theirs))
            assert error < 1e-5
