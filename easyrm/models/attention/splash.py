"""Attention for TPUs: JAX's splash kernel (Pallas), whose block map and mask are computed from the rows' intervals.

R rows, L row length (padded to a multiple of B), N heads, K key-value heads, H head size, B block size, Q = L / B.

JAX offers the kernel with masks known when it is traced, or with a dynamic one as large as the scores. This file calls
the private function underneath, `_splash_attention`: its mask function sees one int32 a query, which here carries both
ends of the query's interval, 16 bits each, and its block map is an array, which here follows from the intervals. The
private function was read and tested in jax 0.9.0, 0.10.2 and 0.11.2; any other signature is met by a warning and plain
XLA.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from easyrm.models.attention.dense import dense_attention

LONGEST_ROW = 2**15
BLOCK_SIZES = (512, 256, 128)

_ARGUMENTS = {
    "mask_infos": ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"),
    "arrays": ("q", "k", "v", "segment_ids", "sinks"),
    "static": (
        *("is_mqa", "block_sizes", "save_residuals", "mask_value", "attn_logits_soft_cap"),
        *("residual_checkpoint_name", "mask_function", "interpret"),
    ),
}
_MASK_FIELDS = ("data_next", "mask_next", "block_mask", "partial_mask_blocks", "q_sequence", "is_dynamic_mask")


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array,
    last_key: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention over keys first_key[r, i] <= j <= last_key[r, i], scaled by 1/sqrt(H).

    q [R, L, N, H], k and v [R, L, K, H], first_key and last_key int32[R, L] -> [R, L, N, H] in q's dtype. Scores and
    softmax are fp32; products take jax_default_matmul_precision. Every query must see at least one key. Blocks that no
    query sees are skipped, forward and backward, and nothing of L x L exists. `interpret` runs the kernel's program on
    any platform, slowly. Under shard_map it needs check_vma=False, as the kernel does. Raises ValueError for a row of
    more than LONGEST_ROW tokens.
    """
    length = q.shape[1]
    if length > LONGEST_ROW:
        raise ValueError(
            f"a row of {length} tokens is too long for splash attention: use rows of at most {LONGEST_ROW}, "
            "or --model.attention=xla"
        )
    if problem := incompatibility():
        warnings.warn(f"no splash attention: {problem}; using --model.attention=xla, which is slower", stacklevel=2)
        return dense_attention(q, k, v, first_key, last_key)
    block, padded = block_size(length)
    heads_first = [_pad(x, padded).swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)]
    itself = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), (q.shape[0], padded))
    intervals = [itself.at[:, :length].set(x) for x in (first_key, last_key)]
    # The kernel prefetches its block map as scalars, which JAX batches by a loop in any case.
    mixed = jax.lax.map(functools.partial(_row, block=block, interpret=interpret), (*heads_first, *intervals))
    return mixed.swapaxes(1, 2)[:, :length]


@functools.cache
def incompatibility() -> str:
    """In what the installed jax differs from the versions that this file was written for; empty if in nothing."""
    private = getattr(kernel, "_splash_attention", None)
    expected = tuple(name for names in _ARGUMENTS.values() for name in names)
    if private is None or tuple(inspect.signature(private).parameters) != expected:
        return f"jax {jax.__version__} changed the arguments of its private function _splash_attention"
    if getattr(mask_info.MaskInfo, "_fields", None) != _MASK_FIELDS:
        return f"jax {jax.__version__} changed the fields of its splash attention's MaskInfo"
    return ""


def block_size(length: int) -> tuple[int, int]:
    """(B, padded row length): the largest block that adds at most an eighth to the row, else the smallest."""
    padded = {size: -(-length // size) * size for size in BLOCK_SIZES}
    block = next((size for size in BLOCK_SIZES if 8 * padded[size] <= 9 * length), BLOCK_SIZES[-1])
    return block, padded[block]


def block_map(first_key: jax.Array, last_key: jax.Array, block: int) -> jax.Array:
    """Which blocks of keys some query of a block sees, bool[Q, Q], of one row's int32[L] intervals."""
    starts = jnp.arange(0, first_key.shape[0], block)
    seen = (first_key[:, None] < starts + block) & (last_key[:, None] >= starts)
    return seen.reshape(len(starts), block, len(starts)).any(1)


def _row(arrays: tuple[jax.Array, ...], block: int, interpret: bool) -> jax.Array:
    """One row: scaled q [N, L, H], k and v [K, L, H], first_key and last_key int32[L] -> [N, L, H]."""
    q, k, v, first_key, last_key = arrays
    visible = block_map(first_key, last_key, block)
    packed = (first_key << 16) | last_key
    by_query = _mask_info(visible, _nearest_visible(visible), packed)
    by_key = _mask_info(visible, _nearest_visible(visible.T).T, packed)
    # The fused backward kernel is left out: it writes one gradient of the queries for each block of keys.
    sizes = kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    return kernel._splash_attention(
        by_query,
        by_query,
        by_key,
        q,
        k,
        v,
        is_mqa=False,
        block_sizes=sizes,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_visible,
        interpret=interpret,
    )


def _visible(packed: jax.Array, key: jax.Array) -> jax.Array:
    return (key >= (packed >> 16)) & (key <= (packed & 0xFFFF))


def _mask_info(visible: jax.Array, next_block: jax.Array, packed: jax.Array) -> mask_info.MaskInfo:
    return mask_info.MaskInfo(
        data_next=next_block.astype(jnp.int32)[None],
        mask_next=None,
        block_mask=visible.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=packed,
    )


def _nearest_visible(visible: jax.Array) -> jax.Array:
    """The block to hold in memory at each step of a line of bool[Q, Q]: a skipped step fetches no new one."""
    blocks = jnp.arange(visible.shape[1])
    first = jnp.where(visible, blocks, len(blocks) - 1).min(1, keepdims=True)
    last = jnp.where(visible, blocks, 0).max(1, keepdims=True)
    return jnp.clip(blocks, first, last)


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
