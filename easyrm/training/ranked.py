"""From the rewards of a batch's slots to the losses and comparisons of its records: pairs, or ranked responses.

M micro-batches, B slots of pairs or groups, H units a group, K = 2 * H responses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from easyrm.data.packing import RowBatch
from easyrm.training.loss import LossConfig, pair_losses


class Compared(NamedTuple):
    """Rewards of the better and of the worse one of each comparison, and its weight, float32[..., B] each.

    Of groups float32[..., B, K, K]: the weights of a group's comparisons sum to that of the group.
    """

    chosen: jax.Array
    rejected: jax.Array
    weight: jax.Array


def compare(rows: RowBatch, chosen: jax.Array, rejected: jax.Array) -> Compared:
    """The comparisons behind accuracy and margins; the rewards of both sides are float32[..., B * H]."""
    if rows.chosen_rank is None:
        return Compared(chosen, rejected, rows.weight)
    one, other, better = _square(rows, chosen, rejected)
    share = better / jnp.maximum(better.sum(axis=(-2, -1), keepdims=True), 1)
    return Compared(*jnp.broadcast_arrays(one, other), share * rows.weight[..., None, None])


def record_losses(config: LossConfig, rows: RowBatch, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """The loss of each pair or group, float32[..., B]; of an unused slot it is noise.

    all_pairs: the mean of `pair_losses` over a group's comparable pairs (InstructGPT, arXiv 2203.02155, equation 1;
    responses of equal rank are not compared).

    plackett_luce: the negative log-likelihood of the ranking (Plackett 1975; arXiv 2305.18290, appendix A.3), each
    stage being the choice of a response before all worse ones, divided by the number of stages: k - 1 without ties, so
    that two responses give Bradley-Terry. A response of equal rank is not among the alternatives. Centering is over
    the same pairs as those of all_pairs.
    """
    if rows.chosen_rank is None:
        return pair_losses(config, chosen, rejected, rows.margin, rows.probability)
    one, other, better = _square(rows, chosen, rejected)
    if config.type == "all_pairs":
        return _mean(pair_losses(config, one, other), better, (-2, -1))
    among = better | jnp.eye(better.shape[-1], dtype=bool)
    stages = jax.nn.logsumexp(other - one, axis=-1, where=among)
    centering = config.center_coef * _mean(jnp.square(one + other), better, (-2, -1))
    return _mean(stages, better.any(axis=-1), -1) + centering


def _square(rows: RowBatch, chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards [..., B, K, 1] and [..., B, 1, K], and whether the first ranks above the second, bool[..., B, K, K]."""
    slots = rows.weight.shape[-1]

    def of_groups(x, y):
        return jnp.stack([x, y], axis=-1).reshape(*x.shape[:-1], slots, -1)

    rewards, ranks = of_groups(chosen, rejected), of_groups(rows.chosen_rank, rows.rejected_rank)
    one, other = ranks[..., :, None], ranks[..., None, :]
    return rewards[..., :, None], rewards[..., None, :], (one >= 0) & (one < other)


def _mean(values: jax.Array, among: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    return jnp.where(among, values, 0).sum(axis) / jnp.maximum(among.sum(axis), 1)
