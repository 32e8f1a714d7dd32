"""Attention for CPUs: blocks of queries against the key blocks that they see, and no others.

R rows, L row length, N heads, K key-value heads, G = N / K queries a key head, H head size. The rows are laid end to
end, S = R * L tokens, and cut into B blocks of 64 queries. The keys that a block sees begin at its smallest first_key
and are taken 64 at a time, so a score tile [K, G * 64, 64] stays in a core's cache. Larger blocks, and several blocks
an iteration, were slower: they compute more invisible scores, and XLA runs batched products on one core either way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERIES = 64
KEYS = 64
# A masked score lies so far below the first running maximum that its weight is exactly zero, whatever comes first.
MASKED, LOWEST = -1e30, -1e20


class _Blocks(NamedTuple):
    """What each block of queries sees: first, last int32[B, 64]; start, tiles int32[B]. Tokens count from row 0's."""

    first: jax.Array
    last: jax.Array
    start: jax.Array
    tiles: jax.Array


@jax.custom_vjp
def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, last_key: jax.Array
) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype. Everything
    is computed in fp32. Every query must see at least one key. The backward pass computes the weights again from the
    saved logarithms of their sums (FlashAttention-2, arXiv 2307.08691). Time grows with the visible blocks alone.
    """
    return _forward(q, k, v, first_key, last_key)[0]


def _forward(q, k, v, first_key, last_key):
    """(output [R, L, N, H], log-sum-exp of the scores float32[B, K, G * 64])."""
    blocks = _plan(first_key, last_key)
    queries, keys, values = _query_blocks(q, k.shape[2]) * q.shape[-1] ** -0.5, _key_heads(k), _key_heads(v)

    def block(i, done):
        query = queries[i]

        def tile(t, sums):
            maximum, total, mixed = sums
            start = blocks.start[i] + t * KEYS
            scores = _scores(query, _window(keys, start), blocks, i, start)
            higher = jnp.maximum(maximum, scores.max(-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(maximum - higher)
            mixed = mixed * shrink[..., None] + _product("kqs,ksh->kqh", weights, _window(values, start))
            return higher, total * shrink + weights.sum(-1), mixed

        empty = jnp.zeros_like(query)
        sums = (jnp.full_like(query[..., 0], LOWEST), empty[..., 0], empty)
        maximum, total, mixed = jax.lax.fori_loop(0, blocks.tiles[i], tile, sums)
        return done[0].at[i].set(mixed / total[..., None]), done[1].at[i].set(maximum + jnp.log(total))

    done = (jnp.zeros_like(queries), jnp.zeros_like(queries[..., 0]))
    mixed, logsum = jax.lax.fori_loop(0, queries.shape[0], block, done)
    return _from_query_blocks(mixed, q), logsum


def _backward(saved, gradient):
    q, k, v, first_key, last_key, out, logsum = saved
    blocks, scale = _plan(first_key, last_key), q.shape[-1] ** -0.5
    queries, keys, values = _query_blocks(q, k.shape[2]) * scale, _key_heads(k), _key_heads(v)
    d_mixed = _query_blocks(gradient, k.shape[2])
    # The softmax's own gradient, summed over the keys: sum_j p_j dp_j = out . d_out.
    inner = (d_mixed * _query_blocks(out, k.shape[2])).sum(-1)

    def block(i, done):
        query, mixed = queries[i], d_mixed[i]

        def tile(t, sums):
            d_query, d_keys, d_values = sums
            start = blocks.start[i] + t * KEYS
            key = _window(keys, start)
            weights = jnp.exp(_scores(query, key, blocks, i, start) - logsum[i][..., None])
            d_weights = _product("kqh,ksh->kqs", mixed, _window(values, start))
            d_scores = weights * (d_weights - inner[i][..., None])
            d_keys = _add(d_keys, _product("kqs,kqh->ksh", d_scores, query), start)
            d_values = _add(d_values, _product("kqs,kqh->ksh", weights, mixed), start)
            return d_query + _product("kqs,ksh->kqh", d_scores, key), d_keys, d_values

        sums = (jnp.zeros_like(query), done[1], done[2])
        d_query, d_keys, d_values = jax.lax.fori_loop(0, blocks.tiles[i], tile, sums)
        return done[0].at[i].set(d_query), d_keys, d_values

    done = (jnp.zeros_like(queries), jnp.zeros_like(keys), jnp.zeros_like(values))
    d_queries, d_keys, d_values = jax.lax.fori_loop(0, queries.shape[0], block, done)
    return (
        _from_query_blocks(d_queries * scale, q),
        _from_key_heads(d_keys, k),
        _from_key_heads(d_values, v),
        None,
        None,
    )


def _save(q, k, v, first_key, last_key):
    out, logsum = _forward(q, k, v, first_key, last_key)
    return out, (q, k, v, first_key, last_key, out, logsum)


blockwise_attention.defvjp(_save, _backward)


def _product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dimensions, a, b, precision="highest")


def _plan(first_key: jax.Array, last_key: jax.Array) -> _Blocks:
    rows, length = first_key.shape
    offset = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    # Queries that fill the last block see themselves, as padding does.
    filling = jnp.arange(rows * length, _filled(rows * length), dtype=jnp.int32)
    first, last = (
        jnp.concatenate([(key + offset).ravel(), filling]).reshape(-1, QUERIES) for key in (first_key, last_key)
    )
    start = first.min(1)
    return _Blocks(first, last, start, (last.max(1) - start) // KEYS + 1)


def _scores(query: jax.Array, key: jax.Array, blocks: _Blocks, i: jax.Array, start: jax.Array) -> jax.Array:
    """Scores [K, G * 64, 64] of block i against the keys from `start`, the invisible ones MASKED."""
    scores = _product("kqh,ksh->kqs", query, key)
    position = start + jnp.arange(KEYS)
    visible = (position >= blocks.first[i][:, None]) & (position <= blocks.last[i][:, None])
    return jnp.where(visible, scores.reshape(len(key), -1, QUERIES, KEYS), MASKED).reshape(scores.shape)


def _filled(tokens: int) -> int:
    return -(-tokens // QUERIES) * QUERIES


def _query_blocks(x: jax.Array, kv_heads: int) -> jax.Array:
    """[R, L, N, H] -> fp32[B, K, G * 64, H], the last block filled with zeros."""
    rows, length, heads, size = x.shape
    fill = _filled(rows * length) - rows * length
    flat = jnp.pad(x.astype(jnp.float32).reshape(rows * length, heads, size), ((0, fill), (0, 0), (0, 0)))
    groups = flat.reshape(-1, QUERIES, kv_heads, heads // kv_heads, size)
    return groups.transpose(0, 2, 3, 1, 4).reshape(-1, kv_heads, heads // kv_heads * QUERIES, size)


def _from_query_blocks(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes _query_blocks: [B, K, G * 64, H] -> the shape and dtype of `like`."""
    rows, length, heads, size = like.shape
    groups = x.reshape(len(x), x.shape[1], -1, QUERIES, size).transpose(0, 3, 1, 2, 4)
    return groups.reshape(-1, heads, size)[: rows * length].reshape(like.shape).astype(like.dtype)


def _key_heads(x: jax.Array) -> jax.Array:
    """[R, L, K, H] -> fp32[K, S + room for a whole window at the end, H]."""
    flat = x.astype(jnp.float32).reshape(-1, *x.shape[2:]).transpose(1, 0, 2)
    return jnp.pad(flat, ((0, 0), (0, _filled(flat.shape[1]) - flat.shape[1] + KEYS), (0, 0)))


def _from_key_heads(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes _key_heads."""
    return x[:, : like.shape[0] * like.shape[1]].transpose(1, 0, 2).reshape(like.shape).astype(like.dtype)


def _window(x: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, KEYS, axis=1)


def _add(x: jax.Array, addend: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _window(x, start) + addend, start, axis=1)
