"""Attention in which every query sees one contiguous interval of its row, one implementation a platform."""

import jax

from easyrm.models.attention.blockwise import blockwise_attention
from easyrm.models.attention.dense import dense_attention
from easyrm.models.attention.pallas_gpu import pallas_gpu_attention
from easyrm.models.attention.splash import splash_attention

IMPLEMENTATIONS = {
    "splash": splash_attention,
    "blockwise": blockwise_attention,
    "pallas_gpu": pallas_gpu_attention,
    "xla": dense_attention,
}
_FASTEST = {"cpu": "blockwise", "tpu": "splash", "gpu": "pallas_gpu"}


def fastest(platform: str) -> str:
    """The name of the implementation that suits a platform (`device.platform`) best."""
    return _FASTEST.get(platform, "xla")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    last_key: jax.Array,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype. Scores and
    softmax are fp32. Every query must see at least one key (a padding token sees itself). The arrays are those of one
    device: nothing is communicated. `implementation` is a key of IMPLEMENTATIONS, or "auto" for the fastest of the
    default platform. Raises ValueError for another name.
    """
    name = fastest(jax.default_backend()) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention {name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, first_key, last_key)
