"""Eight emulated CPU devices for every test, and the few things that many tests need."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from flax import nnx

from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, weights and recorded figures that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real data and recorded figures are not part of the repository")
    return SHARED


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
VARIANTS = {
    "llama2": LlamaConfig(**TINY, initializer_range=0.2),
    "gqa": LlamaConfig(**TINY, num_key_value_heads=2, initializer_range=0.2),
    "mqa_head_dim": LlamaConfig(**TINY, num_key_value_heads=1, head_dim=12, initializer_range=0.2),
    "codellama": LlamaConfig(**TINY, rope_theta=1e6, initializer_range=0.2),
    "llama3.1": LlamaConfig(**TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, initializer_range=0.2),
    "llama3.2": LlamaConfig(
        **TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True, initializer_range=0.2
    ),
    "linear": LlamaConfig(**TINY, rope_scaling={"rope_type": "linear", "factor": 4.0}, initializer_range=0.2),
}


def random_model(config: LlamaConfig, seed: int = 0) -> RewardModel:
    """A reward model with random weights, norms included."""
    model = jax.jit(lambda key: RewardModel(config, nnx.Rngs(key)))(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        treedef, [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )
