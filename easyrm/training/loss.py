"""From two rewards to one number: the loss of a pair, and which losses there are.

M micro-batches, B pair slots.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from easyrm.errors import InputError

PAIR_LOSSES = ("bradley_terry", "scaled_bradley_terry", "hinge")
RANKED_LOSSES = ("all_pairs", "plackett_luce")
LOSS_TYPES = (*PAIR_LOSSES, *RANKED_LOSSES)

# What a type has no use for, and why.
_NO_USE = {
    "scaled_bradley_terry": (("margin", "constant_margin"), "it already uses the margin as a weight; choose one use"),
    "hinge": (("label_smoothing", "soft_labels"), "a hinge is no likelihood of labels; use bradley_terry"),
    "all_pairs": (("margin", "soft_labels"), "ranked responses have no such column; use bradley_terry"),
    "plackett_luce": (
        ("margin", "soft_labels", "constant_margin", "label_smoothing"),
        "it ranks all responses at once and knows no pairs; use all_pairs or bradley_terry",
    ),
}


@dataclasses.dataclass
class LossConfig:
    """`type`: a loss of pairs or of ranked responses, of which a pair is two.

    Of pairs: bradley_terry; scaled_bradley_terry, which weighs each pair by its margin (HelpSteer2-Preference); hinge.
    Of ranked responses: all_pairs (InstructGPT), plackett_luce. See `pair_losses` and `training/ranked.py`.

    `margin` subtracts each pair's margin inside the sigmoid (Llama 2), `constant_margin` the same one for all pairs.
    `center_coef` weighs the squared sum of the two rewards, which keeps them around zero (arXiv 2312.09244).
    `label_smoothing` is the assumed share of labels that are flipped; `soft_labels` takes each pair's `probability`
    that chosen is the better one as its label.
    """

    type: str = "bradley_terry"
    margin: bool = False
    constant_margin: float = 0.0
    center_coef: float = 0.0
    label_smoothing: float = 0.0
    soft_labels: bool = False

    def validate(self) -> None:
        """Raise InputError for values that make no loss."""
        if self.type not in LOSS_TYPES:
            raise InputError(f"--loss.type={self.type}: choose one of {', '.join(LOSS_TYPES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--loss.label_smoothing={self.label_smoothing}: choose a share in [0, 0.5)")
        for name in ("center_coef", "constant_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--loss.{name}={getattr(self, name)}: choose 0 or more")
        names, reason = _NO_USE.get(self.type, ((), ""))
        for name in names:
            if getattr(self, name):
                raise InputError(f"--loss.{name}={getattr(self, name)} with --loss.type={self.type}: {reason}")

    @property
    def needs_margin(self) -> bool:
        """Whether the loss reads the pairs' margins."""
        return self.margin or self.type == "scaled_bradley_terry"

    @property
    def ranked(self) -> bool:
        """Whether the loss is of groups of ranked responses."""
        return self.type in RANKED_LOSSES


def pair_losses(
    config: LossConfig,
    chosen: jax.Array,
    rejected: jax.Array,
    margin: jax.Array | float = 0.0,
    probability: jax.Array | float = 1.0,
) -> jax.Array:
    """The loss of each pair, float32, of the shape of the float32 arguments: [B], [M, B] or scalars.

    With d = chosen - rejected - margin - constant_margin, softplus(-d): Bradley-Terry with Llama 2's margin (arXiv
    2307.09288, equation 2), smoothed, weighed and centered as `config` says. With soft labels p softplus(-d) + (1 - p)
    softplus(d), the cross-entropy. The hinge is max(0, 1 - d).
    """
    difference = chosen - rejected
    if config.margin:
        difference = difference - margin
    if config.constant_margin:
        difference = difference - config.constant_margin
    if config.type == "hinge":
        losses = jax.nn.relu(1 - difference)
    elif config.soft_labels:
        label = (1 - config.label_smoothing) * probability + config.label_smoothing * (1 - probability)
        losses = label * jax.nn.softplus(-difference) + (1 - label) * jax.nn.softplus(difference)
    else:
        flipped = config.label_smoothing
        losses = (1 - flipped) * jax.nn.softplus(-difference) + flipped * jax.nn.softplus(difference)
    if config.type == "scaled_bradley_terry":
        losses = losses * margin
    return losses + config.center_coef * jnp.square(chosen + rejected)
