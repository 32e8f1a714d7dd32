"""Rotary position embedding, half-split as in Hugging Face, always in fp32.

R rows, L row length, N heads, H head size.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from easyrm.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians a position for each of the H/2 rotated pairs, float32[H/2].

    `rope_type` "llama3" divides the low frequencies by `factor` and blends the middle ones smoothly (Llama 3.1
    model card); "linear" divides all of them (position interpolation, arXiv 2306.15595).
    Raises ValueError for a rope type that is not one of these.
    """
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling or {}
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "linear":
        frequencies = frequencies / scaling["factor"]
    elif rope_type == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    elif rope_type != "default":
        raise ValueError(f"rope_type {rope_type!r} is not one of default, linear, llama3")
    return frequencies.astype(np.float32)


def rope_angles(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's rotation, two float32[R, L, 1, H/2], from int32[R, L] positions."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate queries or keys [R, L, N, H] by their positions; computed in fp32, returned in x's dtype."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
