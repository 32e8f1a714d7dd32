"""The trunk and the head against transformers on torch, and by their own properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import VARIANTS, random_model
from transformers import LlamaConfig as TorchConfig
from transformers import LlamaForSequenceClassification

from easyrm.hf.names import weights
from easyrm.models.attention.blockwise import blockwise_attention
from easyrm.models.config import SIZES
from easyrm.models.llama import REMAT_POLICIES, Kernels
from easyrm.models.reward import RewardModel, cast_kernels
from easyrm.models.rope import inverse_frequencies
from easyrm.sharding import path_name


def torch_twin(model: RewardModel, config) -> LlamaForSequenceClassification:
    """The same weights in transformers, fp32, eager attention."""
    twin = LlamaForSequenceClassification(
        TorchConfig(**dataclasses.asdict(config), num_labels=1, pad_token_id=0, attn_implementation="eager")
    )
    table, tensors = weights(config), {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        weight = table[path_name(path)]
        for name, layer in zip(weight.names, leaf if weight.layers else [leaf], strict=True):
            tensors[name] = torch.tensor(np.asarray(layer.T if weight.transposed else layer))
    missing, unexpected = twin.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if "rotary" not in name]
    return twin.eval()


def causal_rewards(model, tokens, at=-1, **how):
    """Rewards of whole rows, each one conversation."""
    rows, length = tokens.shape
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    where = np.stack([np.arange(rows), np.full(rows, at % length)])
    run = jax.jit(
        lambda model: model(
            tokens, positions, np.zeros_like(positions), positions, where, kernels=Kernels(blockwise_attention), **how
        )
    )
    return np.asarray(run(model))


@pytest.mark.parametrize("name", VARIANTS)
def test_rewards_equal_transformers(name):
    config = VARIANTS[name]
    model = random_model(config)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (3, 150))
    with torch.no_grad():
        expected = torch_twin(model, config)(torch.tensor(tokens)).logits[:, 0].numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(causal_rewards(model, tokens), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama3.1-8b", "llama3.2-1b", "llama2-7b", "codellama-7b"])
def test_frequencies_equal_transformers(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = SIZES[name]
    expected = LlamaRotaryEmbedding(TorchConfig(**dataclasses.asdict(config))).inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(config), expected, rtol=1e-6)


def test_rope_is_exact_at_far_positions_under_bf16():
    """The ancestor computed angles in bf16, which cannot tell position 4095 from 4096."""
    model, rows = random_model(VARIANTS["llama2"]), 32
    tokens = np.random.default_rng(0).integers(1, 96, (rows, 24))
    own = np.tile(np.arange(24, dtype=np.int32), (rows, 1))
    at = np.arange(rows), np.full(rows, 23)
    near, far = (  # rotation is relative: moving a conversation along must not change its reward
        cast_kernels(model, jnp.bfloat16)(
            tokens, own + shift, 0 * own, own, at, kernels=Kernels(blockwise_attention), dtype=jnp.bfloat16
        )
        for shift in (0, 4071)
    )
    assert np.std(near - far) < 0.05 * np.std(near)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(remat):
    model = random_model(VARIANTS["gqa"])
    tokens = np.random.default_rng(2).integers(1, 96, (2, 16))
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    at = (np.arange(2), np.full(2, 15))

    def gradient(policy):
        def total(model):
            return model(
                tokens, positions, 0 * positions, positions, at, kernels=Kernels(blockwise_attention), remat=policy
            ).sum()

        return jax.jit(jax.grad(total))(model)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(remat), gradient("none"))


def test_remat_policies_save_different_amounts():
    model = random_model(VARIANTS["gqa"])
    tokens = np.zeros((2, 256), np.int32)
    positions = np.tile(np.arange(256, dtype=np.int32), (2, 1))
    at = (np.arange(2), np.full(2, 255))

    def temporary_bytes(policy):
        def total(model):
            return model(
                tokens, positions, 0 * positions, positions, at, kernels=Kernels(blockwise_attention), remat=policy
            ).sum()

        return jax.jit(jax.grad(total)).lower(model).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("nothing_saveable") < temporary_bytes("dots_saveable") < temporary_bytes("none")


def test_islands_stay_fp32_under_bf16():
    """Norms, embedding and head are not rounded to bf16, and the reward comes out in fp32."""
    model = random_model(VARIANTS["llama2"])
    cast = cast_kernels(model, jnp.bfloat16)
    kept = {
        path_name(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(cast)[0]
        if "layers" not in path_name(path) or "norm" in path_name(path)
    }
    assert len(kept) == 5 and set(kept.values()) == {jnp.dtype(jnp.float32)}
    assert cast.model.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16
    tokens = np.random.default_rng(3).integers(1, 96, (2, 30))
    rough, exact = causal_rewards(cast, tokens, dtype=jnp.bfloat16), causal_rewards(model, tokens)
    assert rough.dtype == np.float32 and np.any(rough != rough.astype(jnp.bfloat16))
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.607),
        ("llama2-13b", 12.852),
        ("llama3.1-8b", 7.505),
        ("llama3.1-70b", 69.503),
        ("llama3.1-405b", 403.752),
    ],
)
def test_published_sizes(name, billions):
    """Parameters of the published models (safetensors totals of the hub), less their LM head, plus a score head."""
    config = SIZES[name]
    total = sum(np.prod(weight.leaf_shape, dtype=float) for weight in weights(config).values())
    assert total / 1e9 == pytest.approx(billions, abs=6e-4)
