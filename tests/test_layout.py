"""Packed rows with a shared prompt give the rewards and gradients of separate sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VARIANTS, random_model

from easyrm.data.packing import RowShape, pack
from easyrm.data.store import TokenPair
from easyrm.models.attention.blockwise import blockwise_attention
from easyrm.models.llama import Kernels
from easyrm.training.loss import LossConfig, pair_losses
from easyrm.training.step import Forward

FORWARD = Forward(jnp.float32, Kernels(blockwise_attention), "none", lambda x: x)


def token_pairs(lengths, seed=0):
    """Pairs with (chosen continuation, prompt, rejected continuation) tokens."""
    rng, pairs = np.random.default_rng(seed), []
    for c, p, r in lengths:
        prompt, chosen, rejected = (rng.integers(1, 96, n, dtype=np.int32) for n in (p, c, r))
        if c and r:
            rejected[0] = chosen[0] % 95 + 1  # the common prefix ends here
        pairs.append(TokenPair(np.r_[prompt, chosen], np.r_[prompt, rejected], p, float("nan"), f"pair:{len(pairs)}"))
    return pairs


def rewards_and_gradients(model, pairs, shape, packing, micro_batches=1):
    batch = pack(
        pairs, shape, micro_batches=micro_batches, packing=packing, pad_id=0, batch_size=len(pairs), row_groups=1
    )

    def total(model, rows):
        chosen, rejected = FORWARD(model, rows)
        return jnp.sum(rows.weight * pair_losses(LossConfig(center_coef=0.1), chosen, rejected, rows.margin)), (
            chosen,
            rejected,
        )

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    rewards, gradients = {}, None
    for m in range(micro_batches):
        rows = jax.tree.map(lambda leaf, m=m: leaf[m], batch)
        (_, sides), addend = run(model, rows)
        gradients = addend if gradients is None else jax.tree.map(jnp.add, gradients, addend)
        for slot in np.flatnonzero(rows.weight):
            rewards[int(rows.order[slot])] = (float(sides[0][slot]), float(sides[1][slot]))
    return np.array([rewards[pair] for pair in range(len(pairs))]), gradients


CASES = {
    "ordinary": [(5, 9, 7), (12, 3, 4), (1, 20, 1), (8, 8, 8)],
    "no common prefix": [(9, 0, 7), (4, 0, 11), (3, 6, 3)],
    "one side a prefix of the other": [(0, 9, 6), (7, 12, 0), (4, 4, 4)],
    "a single conversation": [(0, 15, 0), (3, 5, 2)],
    "a row exactly full": [(10, 12, 10), (16, 8, 8), (6, 4, 6), (4, 8, 4)],
    "sides too long to share a row": [(25, 6, 20), (3, 4, 5), (30, 2, 30)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_packed_equals_separate(case, micro_batches):
    model, pairs = random_model(VARIANTS["llama3.1"]), token_pairs(CASES[case])
    packed, packed_gradients = rewards_and_gradients(model, pairs, RowShape(6, 32), True, micro_batches)
    separate, gradients = rewards_and_gradients(model, pairs, RowShape(2 * len(pairs), 64), False)
    np.testing.assert_allclose(packed, separate, atol=1e-5 * separate.std())
    for ours, expected in zip(jax.tree.leaves(packed_gradients), jax.tree.leaves(gradients), strict=True):
        error = np.linalg.norm(np.ravel(ours - expected)) / np.linalg.norm(np.ravel(expected))
        assert error < 1e-5


def test_swapping_the_sides_negates_the_margin():
    model, pairs = random_model(VARIANTS["gqa"]), token_pairs(CASES["ordinary"])
    swapped = [TokenPair(pair.rejected, pair.chosen, *pair[2:]) for pair in pairs]
    one, _ = rewards_and_gradients(model, pairs, RowShape(4, 32), True)
    other, _ = rewards_and_gradients(model, swapped, RowShape(4, 32), True)
    np.testing.assert_allclose(np.sort(one[:, 0] - one[:, 1]), np.sort(other[:, 1] - other[:, 0]), atol=1e-5)
    assert np.abs(one[:, 0] - one[:, 1]).min() > 1e-3


def test_a_reward_does_not_depend_on_its_neighbours():
    model, pairs = random_model(VARIANTS["gqa"]), token_pairs(CASES["ordinary"])
    alone, _ = rewards_and_gradients(model, pairs[:1], RowShape(1, 32), True)
    together, _ = rewards_and_gradients(model, pairs, RowShape(4, 32), True)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_no_gradient_from_padding():
    model, pairs = random_model(VARIANTS["gqa"]), token_pairs([(3, 4, 5)])
    _, gradients = rewards_and_gradients(model, pairs, RowShape(2, 32), True)
    used = np.unique(np.r_[pairs[0].chosen, pairs[0].rejected])
    rows = np.flatnonzero(np.abs(np.asarray(gradients.model.embed_tokens.weight)).sum(axis=1))
    assert set(rows) == set(used) and 0 not in rows
