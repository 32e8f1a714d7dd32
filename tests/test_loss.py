"""The losses of pairs against torch, against an oracle in float64, and by their properties."""

import itertools
import math

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from easyrm.errors import InputError
from easyrm.training.loss import LOSS_TYPES, LossConfig, pair_losses

rng = np.random.default_rng(0)
CHOSEN, REJECTED, MARGIN = rng.normal(size=(3, 50)).astype(np.float32) * 3
PROBABILITY = rng.random(50).astype(np.float32)
COLUMNS = (CHOSEN, REJECTED, MARGIN, PROBABILITY)


def losses(**settings):
    return np.asarray(pair_losses(LossConfig(**settings), *COLUMNS))


def oracle(config, chosen, rejected, margin, probability):
    """One pair's loss in float64: the cross-entropy of the label under the sigmoid of the difference."""
    logit = chosen - rejected - config.constant_margin - (margin if config.margin else 0)
    if config.type == "hinge":
        loss = max(0.0, 1 - logit)
    else:
        label = probability if config.soft_labels else 1.0
        label = label * (1 - config.label_smoothing) + (1 - label) * config.label_smoothing
        says = 1 / (1 + math.exp(-logit))
        loss = -label * math.log(says) - (1 - label) * math.log(1 - says)
    if config.type == "scaled_bradley_terry":
        loss *= margin
    return loss + config.center_coef * (chosen + rejected) ** 2


MENU = [
    {},
    {"margin": True},
    {"constant_margin": 0.7},
    {"margin": True, "constant_margin": 0.7, "label_smoothing": 0.1, "center_coef": 0.01},
    {"label_smoothing": 0.2},
    {"soft_labels": True},
    {"soft_labels": True, "label_smoothing": 0.1, "margin": True},
    {"type": "scaled_bradley_terry"},
    {"type": "scaled_bradley_terry", "soft_labels": True, "center_coef": 0.3},
    {"type": "hinge"},
    {"type": "hinge", "margin": True, "constant_margin": 0.5, "center_coef": 0.01},
]


@pytest.mark.parametrize("settings", MENU, ids=str)
def test_losses_and_gradients_equal_the_oracle(settings):
    config = LossConfig(**settings)
    config.validate()
    columns = [column.astype(np.float64) for column in COLUMNS]
    expected = [oracle(config, *pair) for pair in zip(*columns, strict=True)]
    np.testing.assert_allclose(losses(**settings), expected, rtol=2e-5, atol=1e-5)

    def total(*rewards):
        return pair_losses(config, *rewards, MARGIN, PROBABILITY).sum()

    step = 1e-6
    for side, gradient in enumerate(jax.grad(total, (0, 1))(CHOSEN, REJECTED)):
        ends = []
        for sign in (1, -1):
            moved = [column + sign * step * (i == side) for i, column in enumerate(columns)]
            ends.append([oracle(config, *pair) for pair in zip(*moved, strict=True)])
        np.testing.assert_allclose(gradient, np.subtract(*ends) / (2 * step), rtol=1e-4, atol=1e-4)


def test_every_setting_changes_the_loss():
    found = {str(settings): losses(**settings) for settings in MENU}
    for one, other in itertools.combinations(found.values(), 2):
        assert np.abs(one - other).max() > 1e-3


def test_bradley_terry_equals_torch():
    c, r, m = map(torch.tensor, (CHOSEN, REJECTED, MARGIN))
    np.testing.assert_allclose(losses(), -logsigmoid(c - r), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses(margin=True), -logsigmoid(c - r - m), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses(type="scaled_bradley_terry"), -m * logsigmoid(c - r), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses(label_smoothing=0.1), -0.9 * logsigmoid(c - r) - 0.1 * logsigmoid(r - c), rtol=1e-5, atol=1e-7
    )


def test_loss_and_gradients_are_those_of_trl():
    """RewardTrainer.compute_loss of trl 0.17, with a margin and with center_rewards_coefficient, as it is written."""
    chosen, rejected = (torch.tensor(x[:, None], requires_grad=True) for x in (CHOSEN, REJECTED))
    loss = -logsigmoid(chosen - rejected - torch.tensor(MARGIN)[:, None]).mean()
    loss += 0.05 * torch.mean((chosen + rejected) ** 2)
    loss.backward()
    config = LossConfig(margin=True, center_coef=0.05)
    ours, gradients = jax.value_and_grad(lambda c, r: pair_losses(config, c, r, MARGIN).mean(), (0, 1))(
        CHOSEN, REJECTED
    )
    assert float(ours) == pytest.approx(loss.item(), rel=1e-6)
    for gradient, expected in zip(gradients, (chosen.grad, rejected.grad), strict=True):
        np.testing.assert_allclose(gradient, expected[:, 0], rtol=1e-5, atol=1e-8)


def test_soft_labels_of_one_and_zero_are_labels():
    one = pair_losses(LossConfig(soft_labels=True), CHOSEN, REJECTED, 0.0, np.ones_like(CHOSEN))
    zero = pair_losses(LossConfig(soft_labels=True), CHOSEN, REJECTED, 0.0, np.zeros_like(CHOSEN))
    np.testing.assert_allclose(one, losses(), rtol=1e-6)
    np.testing.assert_allclose(zero, pair_losses(LossConfig(), REJECTED, CHOSEN), rtol=1e-6)


def test_a_margin_column_does_not_broadcast():
    """The ancestor's margin of shape (B, 1) made the loss a B x B matrix."""
    assert losses(margin=True).shape == losses(margin=True, soft_labels=True).shape == (50,)
    one_by_one = [
        float(pair_losses(LossConfig(margin=True), CHOSEN[i], REJECTED[i], MARGIN[i])) for i in range(len(MARGIN))
    ]
    np.testing.assert_allclose(losses(margin=True), one_by_one, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"soft_labels": True}, {"type": "hinge"}], ids=str)
def test_extreme_rewards_stay_finite(settings):
    extreme = np.float32([1e4, -1e4])
    assert np.isfinite(pair_losses(LossConfig(**settings), extreme, -extreme, 0 * extreme, 0 * extreme + 0.5)).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"type": "listwise"}, "loss.type=listwise: choose one of bradley_terry"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing=0.5"),
        ({"center_coef": -1.0}, "loss.center_coef=-1.0"),
        ({"center_coef": math.nan}, "loss.center_coef=nan"),
        ({"constant_margin": -0.1}, "loss.constant_margin=-0.1"),
        ({"constant_margin": math.inf}, "loss.constant_margin=inf"),
        ({"type": "scaled_bradley_terry", "margin": True}, "loss.margin=True with --loss.type=scaled_bradley_terry"),
        ({"type": "scaled_bradley_terry", "constant_margin": 1.0}, "loss.constant_margin=1.0 with"),
        ({"type": "hinge", "label_smoothing": 0.1}, "loss.label_smoothing=0.1 with --loss.type=hinge"),
        ({"type": "hinge", "soft_labels": True}, "loss.soft_labels=True with --loss.type=hinge"),
        ({"type": "all_pairs", "margin": True}, "loss.margin=True with --loss.type=all_pairs"),
        ({"type": "all_pairs", "soft_labels": True}, "loss.soft_labels=True with --loss.type=all_pairs"),
        ({"type": "plackett_luce", "margin": True}, "loss.margin=True with --loss.type=plackett_luce"),
        ({"type": "plackett_luce", "soft_labels": True}, "loss.soft_labels=True with"),
        ({"type": "plackett_luce", "label_smoothing": 0.1}, "loss.label_smoothing=0.1 with"),
        ({"type": "plackett_luce", "constant_margin": 0.1}, "loss.constant_margin=0.1 with"),
    ],
)
def test_senseless_settings_are_refused(settings, named):
    with pytest.raises(InputError, match=f"--{named}") as refused:
        LossConfig(**settings).validate()
    assert "\n" not in str(refused.value)


def test_plain_settings_of_every_type_are_taken():
    for name in LOSS_TYPES:
        LossConfig(type=name, center_coef=0.1).validate()
    LossConfig(type="all_pairs", label_smoothing=0.1, constant_margin=0.5).validate()
