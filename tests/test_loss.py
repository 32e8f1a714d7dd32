"""The loss against torch, and by its properties."""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from easyrm.errors import InputError
from easyrm.training.loss import LossConfig, pair_losses

rng = np.random.default_rng(0)
CHOSEN, REJECTED, MARGIN = rng.normal(size=(3, 50)).astype(np.float32) * 3


def losses(**settings):
    return np.asarray(pair_losses(LossConfig(**settings), CHOSEN, REJECTED, MARGIN))


def test_bradley_terry_equals_torch():
    c, r, m = map(torch.tensor, (CHOSEN, REJECTED, MARGIN))
    np.testing.assert_allclose(losses(), -logsigmoid(c - r), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses(margin=True), -logsigmoid(c - r - m), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses(type="scaled_bradley_terry"), -m * logsigmoid(c - r), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses(label_smoothing=0.1), -0.9 * logsigmoid(c - r) - 0.1 * logsigmoid(r - c), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(losses(center_coef=0.01), -logsigmoid(c - r) + 0.01 * (c + r) ** 2, rtol=1e-5, atol=1e-6)


def test_a_margin_column_does_not_broadcast():
    """The ancestor's margin of shape (B, 1) made the loss a B x B matrix."""
    assert losses(margin=True).shape == (50,)
    one_by_one = [
        float(pair_losses(LossConfig(margin=True), CHOSEN[i], REJECTED[i], MARGIN[i])) for i in range(len(MARGIN))
    ]
    np.testing.assert_allclose(losses(margin=True), one_by_one, rtol=1e-6)


def test_extreme_rewards_stay_finite():
    extreme = np.float32([1e4, -1e4])
    assert np.isfinite(pair_losses(LossConfig(), extreme, -extreme, 0 * extreme)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "hinge", "label_smoothing": 0.1},
        {"label_smoothing": 0.5},
        {"center_coef": -1.0},
        {"type": "scaled_bradley_terry", "margin": True},
    ],
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match=r"--loss\."):
        LossConfig(**settings).validate()
