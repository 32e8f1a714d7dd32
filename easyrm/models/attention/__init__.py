"""Attention in which every query sees one contiguous interval of its row, one implementation a platform.

Each is softmax attention over the keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H): of q [R, L, N, H],
k and v [R, L, K, H], first_key and last_key int32[R, L] it makes [R, L, N, H] in q's dtype; scores and softmax are
fp32. Every query must see at least one key (a padding token sees itself). The arrays are those of one device: nothing
is communicated.
"""

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
