"""Attention in plain XLA: what the other implementations are compared with, and the fallback for any platform.

R rows, L row length, N heads, K key-value heads, G = N / K queries a key head, H head size, S queries of one slab.
"""

import jax
import jax.numpy as jnp

# Scores that may exist at once, in elements: 256 MiB of fp32. Rows, then query slabs of a row, are taken one after
# another beyond it; the backward pass computes them again.
SCORES_AT_ONCE = 2**26


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, last_key: jax.Array) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype.
    Scores and softmax are fp32. Every query must see at least one key. At most SCORES_AT_ONCE scores (or those of
    eight queries, if more) exist at a time, forward and backward.
    """
    _, length, heads, _ = q.shape
    slab = length
    while slab % 16 == 0 and slab * length * heads > SCORES_AT_ONCE:
        slab //= 2
    slabs_at_once = max(1, SCORES_AT_ONCE // (slab * length * heads))

    def row(arrays):
        q, k, v, first_key, last_key = arrays
        # fp32 here sums the slabs' gradients of keys and values in fp32.
        wide = k.astype(jnp.float32), v.astype(jnp.float32)
        slabs = jax.tree.map(lambda x: x.reshape(-1, slab, *x.shape[1:]), (q, first_key, last_key))
        mix = jax.checkpoint(lambda s: _mix(s[0], wide[0].astype(k.dtype), wide[1].astype(v.dtype), s[1], s[2]))
        return jax.lax.map(mix, slabs).reshape(q.shape)

    return jax.lax.map(row, (q, k, v, first_key, last_key), batch_size=slabs_at_once)


def _mix(q, k, v, first_key, last_key):
    """q [S, N, H], k and v [L, K, H], first_key and last_key int32[S] -> [S, N, H]."""
    queries, heads, size = q.shape
    groups = q.reshape(queries, k.shape[1], heads // k.shape[1], size)
    scores = jnp.einsum("skgh,lkh->kgsl", groups, k, precision="highest", preferred_element_type=jnp.float32)
    keys = jnp.arange(k.shape[0])
    visible = (keys >= first_key[:, None]) & (keys <= last_key[:, None])
    weights = jax.nn.softmax(jnp.where(visible, scores * size**-0.5, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("kgsl,lkh->skgh", weights, v, precision="highest").reshape(q.shape)
