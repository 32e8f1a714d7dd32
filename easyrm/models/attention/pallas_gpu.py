"""Attention for GPUs: a flash-attention kernel in Pallas (Triton) that visits only the blocks that somebody sees.

R rows, L row length (padded to a multiple of BLOCK), N heads, K key-value heads, G = N / K queries a key head, H head
size (padded to a power of two), B = BLOCK, Q = L / B blocks a row. The union of the intervals of neighbouring queries,
each of which holds the query itself, is an interval again: a block of queries sees a range of key blocks, and three
kernels (output; gradient of the queries; gradients of keys and values) loop over such ranges only
(FlashAttention-2, arXiv 2307.08691). jax 0.11 deprecates its Triton backend, which may end with a later release.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64
# Triton multiplies tiles of at least 16 x 16.
SMALLEST_HEAD = 16
# A masked score lies so far below the first running maximum that its weight is exactly zero, whatever comes first.
MASKED, LOWEST = -1e30, -1e20
LOG2_E = math.log2(math.e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def pallas_gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    last_key: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype. Scores,
    softmax and sums are fp32; products of bf16 arrays have bf16 operands. Every query must see at least one key, and
    itself if it is seen at all. The backward pass computes the weights again from the saved logarithms of their sums.
    `interpret` runs the kernels' program on any platform, slowly. Under shard_map it needs check_vma=False.
    """
    return _save(q, k, v, first_key, last_key, interpret)[0]


def _save(q, k, v, first_key, last_key, interpret):
    first, last = _pad_intervals(first_key, last_key)
    out, logsum = _forward(*(_pad(x, first.shape[1]) for x in (q, k, v)), first, last, q.shape[-1] ** -0.5, interpret)
    out = out[:, : q.shape[1], :, : q.shape[-1]]
    return out, (q, k, v, first_key, last_key, out, logsum)


def _backward(interpret, saved, gradient):
    q, k, v, first_key, last_key, out, logsum = saved
    first, last = _pad_intervals(first_key, last_key)
    padded = first.shape[1]
    # The softmax's own gradient, summed over the keys: sum_j p_j dp_j = out . d_out.
    inner = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), -1).swapaxes(1, 2)
    inner = jnp.pad(inner, ((0, 0), (0, 0), (0, padded - q.shape[1])))
    arrays = *(_pad(x, padded) for x in (q, k, v, gradient)), logsum, inner, first, last
    d_q = _queries_gradient(*arrays, q.shape[-1] ** -0.5, interpret)
    d_k, d_v = _keys_gradients(*arrays, q.shape[-1] ** -0.5, interpret)
    return *(d[:, : x.shape[1], :, : x.shape[-1]] for d, x in ((d_q, q), (d_k, k), (d_v, v))), None, None


pallas_gpu_attention.defvjp(_save, _backward)


def _pad_intervals(first_key: jax.Array, last_key: jax.Array) -> list[jax.Array]:
    """Intervals of a multiple of BLOCK tokens; an added token sees itself."""
    rows, length = first_key.shape
    added = jnp.arange(length, -(-length // BLOCK) * BLOCK, dtype=jnp.int32)
    added = jnp.broadcast_to(added, (rows, len(added)))
    return [jnp.concatenate([key, added], axis=1) for key in (first_key, last_key)]


def _pad(x: jax.Array, length: int) -> jax.Array:
    size = max(SMALLEST_HEAD, 1 << (x.shape[-1] - 1).bit_length())
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, size - x.shape[-1])))


def _query_ranges(first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of queries that see each block of keys, int32[R, Q] each."""
    rows = first.shape[0]
    begin = first.reshape(rows, -1, BLOCK).min(2) // BLOCK
    end = last.reshape(rows, -1, BLOCK).max(2) // BLOCK
    blocks = jnp.arange(begin.shape[1], dtype=jnp.int32)
    seen = (begin[:, :, None] <= blocks) & (blocks <= end[:, :, None])
    by_query = blocks[:, None]
    return jnp.where(seen, by_query, len(blocks)).min(1), jnp.where(seen, by_query, -1).max(1)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """fp32 product of two tiles, summed over axis contract[0] of a and contract[1] of b; fp32 operands stay fp32."""
    sums = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, sums, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _scores(q, k, first, last, key_block, scale):
    """Scores [B, B] of a tile, times log2(e), the invisible ones MASKED."""
    keys = key_block * BLOCK + jnp.arange(BLOCK)
    visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
    return jnp.where(visible, _dot(q, k, (1, 1)) * (scale * LOG2_E), MASKED)


def _rows_of(block: jax.Array) -> pl.Slice:
    return pl.ds(block * BLOCK, BLOCK)


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, last_ref, out_ref, logsum_ref, *, scale):
    """Refs: q, out [B, H]; k, v [L, H]; first, last, logsum [B]."""
    q, first, last = q_ref[...], first_ref[...], last_ref[...]

    def tile(block, sums):
        maximum, total, mixed = sums
        scores = _scores(q, k_ref[_rows_of(block), :], first, last, block, scale)
        higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(maximum - higher)
        values = v_ref[_rows_of(block), :]
        mixed = mixed * shrink[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
        return higher, total * shrink + jnp.sum(weights, axis=1), mixed

    empty = jnp.full((BLOCK,), LOWEST, jnp.float32), jnp.zeros((BLOCK,), jnp.float32), jnp.zeros(q.shape, jnp.float32)
    maximum, total, mixed = jax.lax.fori_loop(jnp.min(first) // BLOCK, jnp.max(last) // BLOCK + 1, tile, empty)
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    logsum_ref[...] = maximum + jnp.log2(total)


def _queries_kernel(q_ref, k_ref, v_ref, gradient_ref, logsum_ref, inner_ref, first_ref, last_ref, d_q_ref, *, scale):
    """Refs: q, gradient, d_q [B, H]; k, v [L, H]; logsum, inner, first, last [B]."""
    q, gradient, logsum, inner = q_ref[...], gradient_ref[...], logsum_ref[...], inner_ref[...]
    first, last = first_ref[...], last_ref[...]

    def tile(block, d_q):
        key = k_ref[_rows_of(block), :]
        weights = jnp.exp2(_scores(q, key, first, last, block, scale) - logsum[:, None])
        d_scores = weights * (_dot(gradient, v_ref[_rows_of(block), :], (1, 1)) - inner[:, None])
        return d_q + _dot(d_scores.astype(key.dtype), key, (1, 0))

    empty = jnp.zeros(q.shape, jnp.float32)
    d_q = jax.lax.fori_loop(jnp.min(first) // BLOCK, jnp.max(last) // BLOCK + 1, tile, empty)
    d_q_ref[...] = (d_q * scale).astype(d_q_ref.dtype)


def _keys_kernel(
    q_ref, k_ref, v_ref, gradient_ref, logsum_ref, inner_ref, first_ref, last_ref, begin_ref, end_ref, d_k_ref, d_v_ref,
    *, scale, groups,
):  # fmt: skip
    """Refs: q, gradient [L, G, H]; k, v, d_k, d_v [B, H]; logsum, inner [G, L]; first, last [L]; begin, end [Q]."""
    key_block = pl.program_id(0)
    key, value = k_ref[...], v_ref[...]

    def tile(block, sums, group):
        d_key, d_value = sums
        rows = _rows_of(block)
        q, gradient = q_ref[rows, group, :], gradient_ref[rows, group, :]
        scores = _scores(q, key, first_ref[rows], last_ref[rows], key_block, scale)
        weights = jnp.exp2(scores - logsum_ref[group, rows][:, None])
        d_value += _dot(weights.astype(gradient.dtype), gradient, (0, 0))
        d_scores = weights * (_dot(gradient, value, (1, 1)) - inner_ref[group, rows][:, None])
        return d_key + _dot(d_scores.astype(q.dtype), q, (0, 0)), d_value

    sums = (jnp.zeros(key.shape, jnp.float32),) * 2
    for group in range(groups):
        each = functools.partial(tile, group=group)
        sums = jax.lax.fori_loop(begin_ref[key_block], end_ref[key_block] + 1, each, sums)
    d_k_ref[...] = (sums[0] * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = sums[1].astype(d_v_ref.dtype)


def _call(kernel, name, grid, in_specs, out_specs, out_shape, interpret, size):
    parameters = triton.CompilerParams(num_warps=4 if size <= 64 else 8, num_stages=2)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=parameters,
        interpret=interpret,
        name=f"interval_attention_{name}",
    )


def _specs(q: jax.Array, k: jax.Array) -> dict[str, pl.BlockSpec]:
    """What a program (block, head, row) of the kernels over queries is handed of each kind of array."""
    groups, (_, length, _, size) = q.shape[2] // k.shape[2], q.shape
    return {
        "query": pl.BlockSpec((None, BLOCK, None, size), lambda i, n, r: (r, i, n, 0)),
        "keys": pl.BlockSpec((None, length, None, size), lambda i, n, r: (r, 0, n // groups, 0)),
        "scalar": pl.BlockSpec((None, None, BLOCK), lambda i, n, r: (r, n, i)),
        "interval": pl.BlockSpec((None, BLOCK), lambda i, n, r: (r, i)),
    }


def _forward(q, k, v, first, last, scale, interpret):
    rows, length, heads, size = q.shape
    see = _specs(q, k)
    return _call(
        functools.partial(_forward_kernel, scale=scale),
        "forward",
        (length // BLOCK, heads, rows),
        [see["query"], see["keys"], see["keys"], see["interval"], see["interval"]],
        [see["query"], see["scalar"]],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)],
        interpret,
        size,
    )(q, k, v, first, last)


def _queries_gradient(q, k, v, gradient, logsum, inner, first, last, scale, interpret):
    rows, length, heads, size = q.shape
    see = _specs(q, k)
    one, many, scalar, interval = see["query"], see["keys"], see["scalar"], see["interval"]
    return _call(
        functools.partial(_queries_kernel, scale=scale),
        "queries",
        (length // BLOCK, heads, rows),
        [one, many, many, one, scalar, scalar, interval, interval],
        one,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret,
        size,
    )(q, k, v, gradient, logsum, inner, first, last)


def _keys_gradients(q, k, v, gradient, logsum, inner, first, last, scale, interpret):
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    many = pl.BlockSpec((None, length, groups, size), lambda j, h, r: (r, 0, h, 0))
    one = pl.BlockSpec((None, BLOCK, None, size), lambda j, h, r: (r, j, h, 0))
    scalar = pl.BlockSpec((None, groups, length), lambda j, h, r: (r, h, 0))
    interval = pl.BlockSpec((None, length), lambda j, h, r: (r, 0))
    block_range = pl.BlockSpec((None, length // BLOCK), lambda j, h, r: (r, 0))
    return _call(
        functools.partial(_keys_kernel, scale=scale, groups=groups),
        "keys",
        (length // BLOCK, kv_heads, rows),
        [many, one, one, many, scalar, scalar, interval, interval, block_range, block_range],
        [one, one],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        interpret,
        size,
    )(q, k, v, gradient, logsum, inner, first, last, *_query_ranges(first, last))
