"""From the rewards of pairs to one number.

M micro-batches, B pair slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from easyrm.errors import InputError

LOSS_TYPES = ("bradley_terry", "scaled_bradley_terry")


@dataclasses.dataclass
class LossConfig:
    """`type`: bradley_terry, or scaled_bradley_terry, which weighs each pair by its margin (HelpSteer2-Preference).

    `margin` subtracts each pair's margin inside the sigmoid (Llama 2). `center_coef` weighs the squared sum of the
    two rewards, which keeps them around zero (arXiv 2312.09244). `label_smoothing` is the assumed share of labels
    that are flipped.
    """

    type: str = "bradley_terry"
    margin: bool = False
    center_coef: float = 0.0
    label_smoothing: float = 0.0

    def validate(self) -> None:
        """Raise InputError for values that make no loss."""
        if self.type not in LOSS_TYPES:
            raise InputError(f"--loss.type={self.type}: choose one of {', '.join(LOSS_TYPES)}")
        if self.type == "scaled_bradley_terry" and self.margin:
            raise InputError("--loss.margin: scaled_bradley_terry already uses the margin as a weight; choose one use")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--loss.label_smoothing={self.label_smoothing}: choose a share in [0, 0.5)")
        if self.center_coef < 0:
            raise InputError(f"--loss.center_coef={self.center_coef}: choose 0 or more")

    @property
    def needs_margin(self) -> bool:
        """Whether the loss reads the pairs' margins."""
        return self.margin or self.type == "scaled_bradley_terry"


def pair_losses(config: LossConfig, chosen: jax.Array, rejected: jax.Array, margin: jax.Array) -> jax.Array:
    """The loss of each pair, float32, of the shape of the three float32 arguments: [B], [M, B] or scalars.

    softplus(-(chosen - rejected - margin)), Bradley-Terry with Llama 2's margin (arXiv 2307.09288, equation 2),
    smoothed and centered as `config` says.
    """
    difference = chosen - rejected
    if config.margin:
        difference = difference - margin
    flipped = config.label_smoothing
    losses = (1 - flipped) * jax.nn.softplus(-difference) + flipped * jax.nn.softplus(difference)
    if config.type == "scaled_bradley_terry":
        losses = losses * margin
    return losses + config.center_coef * jnp.square(chosen + rejected)
