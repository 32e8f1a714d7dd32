"""The schedule by hand, Adam and clipping against torch."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easyrm.errors import InputError
from easyrm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


@pytest.mark.parametrize(
    ("steps", "ratio", "end"), [(60, 0.03, 0.0), (10, 0.5, 1e-4), (7, 0.0, 0.0), (1, 0.03, 0.0), (20, 0.1, 1e-2)]
)
def test_schedule(steps, ratio, end):
    config = OptimizerConfig(lr=1e-3, end_lr=end, warmup_ratio=ratio)
    schedule, warmup = learning_rate_schedule(config, steps), math.ceil(ratio * steps)
    for k in range(steps):
        expected = k / warmup * 1e-3 if k < warmup else 1e-3 + (end - 1e-3) * (k - warmup) / (steps - warmup)
        assert float(schedule(k)) == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_no_warmup_means_none():
    """The ancestor took warmup_ratio 0 for 2,000 steps."""
    assert float(learning_rate_schedule(OptimizerConfig(lr=1e-3, warmup_ratio=0.0), 100)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_equal_torch_adamw(decay):
    config = OptimizerConfig(
        lr=1e-2, end_lr=1e-2, warmup_ratio=0.0, b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay, clip_norm=0.5
    )
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    params = {"kernel": jnp.array(start)}
    optimizer = make_optimizer(config, 5)
    state = optimizer.init(params)
    twin = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.AdamW([twin], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    for _ in range(5):
        gradient = rng.normal(size=(4, 3)).astype(np.float32)
        updates, state = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
        twin.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([twin], 0.5)
        adam.step()
    np.testing.assert_allclose(params["kernel"], twin.detach().numpy(), rtol=2e-5)


KNOBS = {
    "lr": 2e-2,
    "end_lr": 1e-3,
    "warmup_ratio": 0.5,
    "b1": 0.5,
    "b2": 0.9,
    "eps": 1e-2,
    "weight_decay": 0.5,
    "clip_norm": 1e-3,
    "mu_dtype": "bf16",
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_changes_the_third_update(knob):
    def third(config):
        optimizer, params = make_optimizer(config, 4), {"kernel": jnp.ones((2, 3))}
        state = optimizer.init(params)
        for scale in (0.01, -0.03, 0.005):
            updates, state = optimizer.update({"kernel": scale * jnp.arange(6.0).reshape(2, 3)}, state, params)
        return np.asarray(updates["kernel"])

    base = {"lr": 1e-2}
    changed = third(OptimizerConfig(**{**base, knob: KNOBS[knob]}))
    assert np.abs(changed - third(OptimizerConfig(**base))).max() > 1e-7


def test_norms_do_not_decay():
    config = OptimizerConfig(lr=1e-2, end_lr=1e-2, warmup_ratio=0.0, weight_decay=0.5)
    params = {"norm": {"weight": jnp.ones(3)}, "o_proj": {"kernel": jnp.ones((3, 3))}}
    zeros = {"norm": {"weight": jnp.zeros(3)}, "o_proj": {"kernel": jnp.zeros((3, 3))}}
    optimizer = make_optimizer(config, 2)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(updates["norm"]["weight"] == 0) and np.all(updates["o_proj"]["kernel"] < 0)


def test_moments_in_bf16_on_request():
    state = make_optimizer(OptimizerConfig(mu_dtype="bf16"), 2).init({"kernel": jnp.ones(3)})
    dtypes = (
        {str(leaf.dtype) for leaf in state[1][0].mu.values()},
        {str(leaf.dtype) for leaf in state[1][0].nu.values()},
    )
    assert dtypes == ({"bfloat16"}, {"float32"})


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"lr": math.nan}, {"b2": 1.0}, {"warmup_ratio": 1.5}, {"mu_dtype": "fp16"}]
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(InputError, match=r"--optimizer\."):
        OptimizerConfig(**settings).validate()
