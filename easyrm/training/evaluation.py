"""Pairwise accuracy and loss over a whole set of pairs."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from easyrm.training.loss import LossConfig, pair_losses


def evaluate(
    rewards_of: Callable[[Any], tuple[jax.Array, jax.Array]], batches: Iterable[tuple[Any, Any]], loss: LossConfig
) -> dict[str, float]:
    """`eval/...` metrics over all pairs of `batches`, each (pair indices, row batch); padded slots do not count.

    `rewards_of` gives float32[M, B] rewards of both sides. Means are sums over counts; a tie is wrong.
    """
    kept = []
    for _, batch in batches:
        chosen, rejected = jax.device_get(rewards_of(batch))
        real = batch.weight > 0
        kept.append(np.stack([chosen[real], rejected[real], batch.margin[real]]))
    chosen, rejected, margin = np.concatenate(kept, axis=1)
    return {
        "eval/loss": float(np.mean(pair_losses(loss, chosen, rejected, margin))),
        "eval/accuracy": float(np.mean(chosen > rejected)),
        "eval/chosen_reward_mean": float(chosen.mean()),
        "eval/rejected_reward_mean": float(rejected.mean()),
        "eval/margin": float(np.mean(chosen - rejected)),
        "eval/pairs": chosen.size,
    }
