"""The state of a run and the two functions that devices execute: the training step and the reward of pairs.

M micro-batches, R rows, L row length, B slots of pairs or of units of groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from easyrm.data.packing import RowBatch
from easyrm.models.llama import Kernels
from easyrm.models.reward import RewardModel, cast_kernels
from easyrm.training.loss import LossConfig
from easyrm.training.ranked import compare, record_losses

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


class TrainState(NamedTuple):
    """All that training changes: fp32 parameters, Adam's moments, whose count is the number of steps taken, `sound`.

    `sound` (bool[]) is false after a step whose loss or gradient was not finite; then nothing changes any more.
    """

    model: RewardModel
    optimizer: optax.OptState
    sound: jax.Array


@dataclasses.dataclass(frozen=True)
class Forward:
    """How a model is run: the compute dtype and what Llama.__call__ takes besides tokens."""

    dtype: jnp.dtype
    kernels: Kernels
    remat: str
    constrain: Callable[[jax.Array], jax.Array]

    def __call__(self, model: RewardModel, rows: RowBatch) -> tuple[jax.Array, jax.Array]:
        """Rewards of the chosen and of the rejected side of each slot, float32[B] each, of rows [R, L]."""
        at = (
            jnp.stack([rows.chosen_row, rows.rejected_row]),
            jnp.stack([rows.chosen_column, rows.rejected_column]),
        )
        chosen, rejected = cast_kernels(model, self.dtype)(
            rows.tokens,
            rows.positions,
            rows.first_key,
            rows.last_key,
            at,
            dtype=self.dtype,
            kernels=self.kernels,
            remat=self.remat,
            constrain=self.constrain,
        )
        return chosen, rejected


def make_reward_step(forward: Forward) -> Callable[[RewardModel, RowBatch], tuple[jax.Array, jax.Array]]:
    """A function from a batch [M, R, L] to the rewards of both sides, float32[M, B] each; unused slots are noise."""

    def reward_step(model, batch):
        _, rewards = jax.lax.scan(lambda carry, rows: (carry, forward(model, rows)), None, batch)
        return rewards

    return reward_step


def make_train_step(
    forward: Forward, optimizer: optax.GradientTransformation, loss: LossConfig, *, skip_nonfinite: bool = False
) -> Callable[[TrainState, RowBatch], tuple[TrainState, dict[str, Any]]]:
    """A function (state, batch [M, R, L]) -> (state, metrics): one optimizer update over all pairs of the batch.

    The loss is the mean over the batch's pairs (or groups of ranked responses), however they lie in micro-batches and
    rows. Metrics are float32 scalars; `param_norm` is taken after the update, `grad_norm` before clipping.

    An update whose loss or gradient is not finite is not applied. The state stays what it was before that step, also
    through the steps after it; with `skip_nonfinite` they go on, and only the step count has moved.
    """

    def train_step(state, batch):
        pairs = batch.weight.sum()

        def loss_of(model, rows):
            chosen, rejected = forward(model, rows)
            losses = record_losses(loss, rows, chosen, rejected)
            return jnp.sum(losses * rows.weight) / pairs, (chosen, rejected)

        def accumulate(gradients, rows):
            (value, rewards), addend = jax.value_and_grad(loss_of, has_aux=True)(state.model, rows)
            return jax.tree.map(jnp.add, gradients, addend), (value, rewards)

        zeros = jax.tree.map(jnp.zeros_like, state.model)
        gradients, (losses, (chosen, rejected)) = jax.lax.scan(accumulate, zeros, batch)
        updates, moments = optimizer.update(gradients, state.optimizer, state.model)
        value, norm = losses.sum(), optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        sound = state.sound if skip_nonfinite else state.sound & finite

        def guarded(new, old):
            counts = skip_nonfinite and jnp.issubdtype(new.dtype, jnp.integer)
            return new if counts else jnp.where(finite & sound, new, old)

        model, moments = jax.tree.map(
            guarded, (optax.apply_updates(state.model, updates), moments), (state.model, state.optimizer)
        )
        metrics = {
            "loss": value,
            **reward_statistics(*compare(batch, chosen, rejected)),
            "grad_norm": norm,
            "param_norm": optax.tree.norm(model),
        }
        return TrainState(model, moments, sound), metrics

    return train_step


def reward_statistics(chosen: jax.Array, rejected: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Accuracy (a tie is wrong), means, population standard deviations and mean margin of the weighted pairs."""

    def mean(x):
        return jnp.sum(x * weight) / weight.sum()

    def std(x):
        return jnp.sqrt(mean(jnp.square(x - mean(x))))

    return {
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "chosen_reward_mean": mean(chosen),
        "rejected_reward_mean": mean(rejected),
        "chosen_reward_std": std(chosen),
        "rejected_reward_std": std(rejected),
        "margin": mean(chosen - rejected),
    }
