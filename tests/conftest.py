"""Eight emulated CPU devices for every test, and the few things that many tests need."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Programs that several tests and their subprocesses compile are compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ.pop("HF_HUB_OFFLINE", None)

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import settings

from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel

# The machine's own ways to the network, of which JAX warns, and to git are not those of the tests.
for name in list(os.environ):
    if name.startswith("GIT_") or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
# A busy machine is late, and a test that fails fails again.
settings.register_profile("easyrm", deadline=None, derandomize=True, database=None)
settings.load_profile("easyrm")

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
    "llama2": LlamaConfig(**TINY),
    "gqa": LlamaConfig(**TINY, num_key_value_heads=2),
    "mqa_head_dim": LlamaConfig(**TINY, num_key_value_heads=1, head_dim=12),
    "codellama": LlamaConfig(**TINY, rope_theta=1e6),
    "llama3.1": LlamaConfig(**TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING),
    "llama3.2": LlamaConfig(**TINY, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True),
    "linear": LlamaConfig(**TINY, rope_scaling={"rope_type": "linear", "factor": 4.0}),
}


def random_model(config: LlamaConfig, seed: int = 0) -> RewardModel:
    """A reward model with random weights, norms included; drawn by NumPy, which has nothing to compile."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda key: RewardModel(config, nnx.Rngs(key)), jax.random.key(0))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.numpy.asarray(1 + 0.1 * noise if "norm" in jax.tree_util.keystr(path) else 0.2 * noise)

    return jax.tree_util.tree_map_with_path(draw, abstract)
