"""A trained reward model as a Hugging Face directory, written without ever holding the whole model."""

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from easyrm.digests import digests
from easyrm.file_digests import write_digests
from easyrm.hf.config import exported_config, write_config
from easyrm.hf.directory import (
    DTYPES,
    MAX_SHARD_BYTES,
    finish_directory,
    is_remote,
    plan_shards,
    refuse_existing,
    save_shard,
    staging_directory,
    write_index,
)
from easyrm.hf.names import weights
from easyrm.models.config import LlamaConfig
from easyrm.sharding import path_name


def export(
    params: Any,
    config: LlamaConfig,
    output: str | epath.PathLike,
    *,
    raw_config: dict[str, Any],
    write_tokenizer: Callable[[Path], None],
    card: str,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, weights in shards, tokenizer, digests.json and README.md (`card`) into the new `output`.

    `raw_config` gives the token ids (see `exported_config`); `write_tokenizer` writes its files into the local
    directory it is given. `dtype` is bf16 (rounded to nearest even, as torch does) or fp32. With several processes all
    must call this, because every tensor is gathered from all of them; those that see process 0's disk, or write to a
    bucket, take turns in writing the weight files. A host holds at most one shard and one tensor. The digests are of
    the parameters as an import will get them.

    A local `output` appears under its name only when complete: it is written beside it and renamed. Object stores
    cannot rename, so on `gs://` config.json is written last: a directory without it is not finished. Raises InputError
    where `output` exists and is not empty, and as `exported_config` does.
    """
    exported_config(config, raw_config, dtype)  # refuses bad token ids before anything is written
    output = refuse_existing(output)
    _meet("output checked")
    parameters = digests_as_imported(params, dtype)
    with staging_directory(output) as staging:
        _write_weights(params, config, staging, output, dtype, max_shard_bytes)
        _meet("weights written")
        if jax.process_index() == 0:
            write_index(staging, config, dtype, max_shard_bytes)
            write_tokenizer(staging)
            (staging / "README.md").write_text(card, encoding="utf-8")
            write_config(staging, config, raw_config, dtype)
            write_digests(staging, parameters)
            finish_directory(staging, output)
    _meet("written")


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"easyrm export: {where}")


def _write_weights(
    params: Any, config: LlamaConfig, staging: Path, output: epath.Path, dtype: str, max_shard_bytes: int
) -> None:
    """The weight files, each by one process, which writes while the others go on with the next."""
    leaves = {path_name(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    table = weights(config)
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: w.leaf_shape for path, w in table.items()}:
        raise ValueError("the parameters to export do not have the shapes of their configuration")
    origin = {
        name: (leaves[path], layer, weight.transposed)
        for path, weight in table.items()
        for layer, name in zip(range(weight.layers) if weight.layers else [None], weight.names, strict=True)
    }

    writers, written, background = _writers(staging, output), None, ThreadPoolExecutor(1)
    try:
        for turn, (file, names) in enumerate(plan_shards(config, dtype, max_shard_bytes).items()):
            mine = writers[turn % len(writers)] == jax.process_index()
            if mine and written:
                written.result()  # at most one shard a host
            tensors = {name: _to_host(*origin[name], dtype=dtype, keep=mine) for name in names}
            if mine:
                written = background.submit(save_shard, staging, output, file, tensors)
            del tensors  # else held while the next are gathered
        if written:
            written.result()
    finally:
        background.shutdown(wait=False)  # a stop does not wait for an upload


def _writers(staging: Path, output: epath.Path) -> list[int]:
    """The processes that see process 0's directory; each has one of its own where the output is a bucket."""
    # A file that no earlier export on a disk of another host can have left.
    mark = staging / f".{multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))}"
    if jax.process_index() == 0 or is_remote(output):
        mark.touch()
    _meet("begun")
    seen = np.atleast_1d(multihost_utils.process_allgather(np.array(mark.exists())))
    if jax.process_index() == 0 or is_remote(output):
        mark.unlink()
    return [index for index, sees in enumerate(seen) if sees]


def _to_host(
    leaf: jax.Array, layer: int | None, transposed: bool, *, dtype: str, keep: bool = True
) -> np.ndarray | None:
    """One tensor as Hugging Face stores it, on this host; it is rounded where it lies, before it travels.

    Without `keep`, this process's devices take part in gathering it, and None is returned.
    """
    tensor = _round_whole(leaf, DTYPES[dtype]) if layer is None else _round_layer(leaf, layer, DTYPES[dtype])
    if not tensor.is_fully_addressable:
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        tensor = jax.jit(_same, out_shardings=everywhere)(tensor).block_until_ready().addressable_data(0)
    if not keep:
        return None
    tensor = np.asarray(tensor)
    return np.ascontiguousarray(tensor.T if transposed else tensor)


def _same(tensor: jax.Array) -> jax.Array:
    return tensor


def digests_as_imported(params: Any, dtype: str) -> dict[str, str]:
    """The digests of the parameters rounded to `dtype` and back in fp32, leaf by leaf: one is held twice at a time."""
    found = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        found |= digests({path_name(key): _rounded_to_bf16(leaf) if dtype == "bf16" else leaf})
    return found


@jax.jit
def _rounded_to_bf16(leaf: jax.Array) -> jax.Array:
    # By bits: XLA may leave out a conversion to bf16 and back.
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


@jax.jit(static_argnums=1)
def _round_whole(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return leaf.astype(dtype)


@jax.jit(static_argnums=2)
def _round_layer(leaf: jax.Array, layer: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False).astype(dtype)
