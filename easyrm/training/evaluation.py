"""Pairwise accuracy and loss over a whole set of pairs or of ranked responses."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from easyrm.data.packing import RowBatch
from easyrm.training.loss import LossConfig
from easyrm.training.ranked import compare, record_losses

METRICS = ("eval/loss", "eval/accuracy", "eval/chosen_reward_mean", "eval/rejected_reward_mean", "eval/margin")


class Evaluated(NamedTuple):
    """`figures`: METRICS and `eval/pairs`, the number of pairs or groups. The rewards of each pair, float32[pairs].

    They are in the order of the data; of groups they are those of the comparable pairs, group after group.
    """

    figures: dict[str, float]
    chosen: np.ndarray
    rejected: np.ndarray


def evaluate(
    rewards_of: Callable[[Any], tuple[jax.Array, jax.Array]],
    batches: Iterable[tuple[Any, RowBatch]],
    loss: LossConfig,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluated | None:
    """Evaluate all pairs of `batches`, each (indices, rows); padded slots do not count.

    `rewards_of` gives float32[M, B] rewards of both sides. Means are sums over counts, of groups means over groups of
    the mean over a group's comparisons; a tie is wrong. None where `stop`, asked before each batch, ended it.
    """
    kept, seen = [], 0
    for _, batch in batches:
        if stop():
            return None
        rewards = jax.device_get(rewards_of(batch))
        slots = batch._replace(tokens=None, positions=None, first_key=None, last_key=None, order=batch.order + seen)
        kept.append((slots, rewards))
        seen += int(batch.weight.sum())
    slots, rewards = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept)
    real = slots.weight > 0
    order = np.argsort(slots.order[real])
    losses, compared = jax.device_get((record_losses(loss, slots, *rewards), compare(slots, *rewards)))
    chosen, rejected, weight = (values[real][order] for values in compared)
    chosen, rejected, weight = (values[weight > 0] for values in (chosen, rejected, weight.astype(np.float64)))
    means = [np.average(x, weights=weight) for x in (chosen > rejected, chosen, rejected, chosen - rejected)]
    values = (float(np.mean(losses[real], dtype=np.float64)), *map(float, means))
    return Evaluated({**dict(zip(METRICS, values, strict=True)), "eval/pairs": seen}, chosen, rejected)
