"""Checksums of arrays by value: the same on every mesh, file layout and host count, and as cheap as one read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyrm.sharding import path_name

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree: Any) -> dict[str, str]:
    """Eight hexadecimal digits for each leaf, by path. Every process calls it, and every process gets all of them.

    A leaf's digest is the sum, modulo 2**32, of a mix of each element's bits and place. The mix is one-to-one, so that
    no change of a single element goes unseen, and other damage does with a chance of 2**-32.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {path_name(path): f"{int(value):08x}" for (path, _), value in zip(leaves, sums, strict=True)}


def add_part(digest: str, part: np.ndarray, first: int) -> str:
    """The digest of a leaf with one more part of it: the elements that stand, in C order, from `first` on.

    A leaf of which nothing was added yet has "00000000"; parts may come in any order, each once.
    """
    total = int(digest, 16) + int(_part_sum(part.reshape(-1), np.uint32(first % 2**32)))
    return f"{total % 2**32:08x}"


@jax.jit
def _part_sum(part: jax.Array, first: jax.Array) -> jax.Array:
    return jnp.sum(_mixed(part, first), dtype=jnp.uint32)


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(_mixed(leaf), dtype=jnp.uint32) for leaf in leaves]


def _mixed(leaf: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    strides = np.cumprod([1, *leaf.shape[:0:-1]], dtype=np.uint64).astype(np.uint32)[::-1]
    axes = (jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) for axis in range(leaf.ndim))
    place = functools.reduce(
        jnp.add, (axis * stride for axis, stride in zip(axes, strides, strict=False)), jnp.uint32(first)
    )
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    # The finalizer of MurmurHash3 (Appleby, public domain) spreads each bit over all.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return mixed ^ (mixed >> 16)
