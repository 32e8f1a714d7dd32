"""Attention in which every query sees one contiguous interval of its row.

R rows, L row length, N heads, K key-value heads, G = N / K queries a key head, H head size.
"""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, last_key: jax.Array) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype.
    Scores and softmax are fp32. Every query must see at least one key (a padding token sees itself).
    """
    rows, length, heads, size = q.shape
    groups = q.reshape(rows, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("rqkgh,rskh->rkgqs", groups, k, precision="highest", preferred_element_type=jnp.float32)
    keys = jnp.arange(length)
    visible = (keys >= first_key[..., None]) & (keys <= last_key[..., None])
    scores = jnp.where(visible[:, None, None], scores * size**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("rkgqs,rskh->rqkgh", weights, v, precision="highest")
    return mixed.reshape(q.shape)
