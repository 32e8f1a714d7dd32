"""Pairwise accuracy and loss over a whole set of pairs."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from easyrm.training.loss import LossConfig, pair_losses

METRICS = ("eval/loss", "eval/accuracy", "eval/chosen_reward_mean", "eval/rejected_reward_mean", "eval/margin")


def evaluate(
    rewards_of: Callable[[Any], tuple[jax.Array, jax.Array]],
    batches: Iterable[tuple[Any, Any]],
    loss: LossConfig,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """METRICS and `eval/pairs` over all pairs of `batches`, each (pair indices, row batch); padded slots do not count.

    `rewards_of` gives float32[M, B] rewards of both sides. Means are sums over counts; a tie is wrong. None where
    `stop`, asked before each batch, ended it.
    """
    kept = []
    for _, batch in batches:
        if stop():
            return None
        chosen, rejected = jax.device_get(rewards_of(batch))
        real = batch.weight > 0
        kept.append(np.stack([chosen[real], rejected[real], batch.margin[real]]))
    chosen, rejected, margin = np.concatenate(kept, axis=1)
    losses = pair_losses(loss, chosen, rejected, margin)
    means = [float(np.mean(x)) for x in (losses, chosen > rejected, chosen, rejected, chosen - rejected)]
    return {**dict(zip(METRICS, means, strict=True)), "eval/pairs": chosen.size}
