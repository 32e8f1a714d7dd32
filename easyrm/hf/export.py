"""A trained reward model as a Hugging Face directory, written without ever holding the whole model."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from easyrm.digests import digests
from easyrm.errors import InputError
from easyrm.file_digests import write_digests
from easyrm.hf.config import exported_config, write_config
from easyrm.hf.names import Weight, weights
from easyrm.models.config import LlamaConfig
from easyrm.sharding import path_name

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}
MAX_SHARD_BYTES = 5 * 10**9


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
    directory it is given. `dtype` is bf16 (rounded to nearest even, as torch does) or fp32. Process 0 writes; with
    several processes all must call this, because every tensor is gathered from all of them. The host holds at most one
    shard and one tensor. The digests are of the parameters as an import will get them.

    A local `output` appears under its name only when complete: it is written beside it and renamed. Object stores
    cannot rename, so on `gs://` config.json is written last: a directory without it is not finished. Raises InputError
    where `output` exists and is not empty, and as `exported_config` does.
    """
    exported_config(config, raw_config, dtype)  # refuses bad token ids before anything is written
    output = refuse_existing(output)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("easyrm export: output checked")
    parameters = digests_as_imported(params, dtype)
    writes = jax.process_index() == 0
    with _staging(output) if writes else contextlib.nullcontext() as staging:
        for name, tensors in _shards(params, config, dtype, max_shard_bytes, keep=writes):
            if writes:
                save_file(tensors, staging / name, metadata={"format": "pt"})
                _move_if_remote(staging, output)
        if writes:
            _write_index(staging, config, dtype, max_shard_bytes)
            write_tokenizer(staging)
            (staging / "README.md").write_text(card, encoding="utf-8")
            write_config(staging, config, raw_config, dtype)
            write_digests(staging, parameters)
            _finish(staging, output)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("easyrm export: written")


def refuse_existing(output: str | epath.PathLike) -> epath.Path:
    """The path of a directory to be exported to. Raises InputError unless it is absent or empty."""
    output = epath.Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output}: exists and is not empty; choose another output or remove it")
    return output


def plan_shards(config: LlamaConfig, dtype: str, max_shard_bytes: int) -> dict[str, list[str]]:
    """Tensor names by file name, in the order of `weights`; a tensor over the limit has a file to itself."""
    groups: list[list[str]] = []
    filled = math.inf
    for weight in weights(config).values():
        size = _tensor_bytes(weight, dtype)
        for name in weight.names:
            if filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _tensor_bytes(weight: Weight, dtype: str) -> int:
    return math.prod(weight.shape) * jnp.dtype(DTYPES[dtype]).itemsize


def _shards(
    params: Any, config: LlamaConfig, dtype: str, max_shard_bytes: int, keep: bool
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (file name, its tensors); without `keep` the tensors are gathered all the same, and let go."""
    leaves = {path_name(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    table = weights(config)
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: w.leaf_shape for path, w in table.items()}:
        raise ValueError("the parameters to export do not have the shapes of their configuration")
    origin = {
        name: (leaves[path], layer, weight.transposed)
        for path, weight in table.items()
        for layer, name in zip(range(weight.layers) if weight.layers else [None], weight.names, strict=True)
    }
    for file, names in plan_shards(config, dtype, max_shard_bytes).items():
        tensors = {}
        for name in names:
            tensor = _to_host(*origin[name], dtype=dtype)
            if keep:
                tensors[name] = tensor
        yield file, tensors


def _to_host(leaf: jax.Array, layer: int | None, transposed: bool, dtype: str) -> np.ndarray:
    """One tensor as Hugging Face stores it, on this host; it is rounded where it lies, before it travels."""
    tensor = _round_whole(leaf, DTYPES[dtype]) if layer is None else _round_layer(leaf, layer, DTYPES[dtype])
    if not tensor.is_fully_addressable:
        tensor = multihost_utils.process_allgather(tensor, tiled=True)
    tensor = np.asarray(tensor)
    return np.ascontiguousarray(tensor.T if transposed else tensor)


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


def _write_index(staging: Path, config: LlamaConfig, dtype: str, max_shard_bytes: int) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    plan = plan_shards(config, dtype, max_shard_bytes)
    if len(plan) == 1:
        return
    total = sum(_tensor_bytes(weight, dtype) * len(weight.names) for weight in weights(config).values())
    files = {name: file for file, names in plan.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


@contextlib.contextmanager
def _staging(output: epath.Path) -> Iterator[Path]:
    """A local directory to write in: beside a local output, so that a rename suffices. It is gone in the end.

    One that a killed export left behind is removed first.
    """
    if _is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = Path(output).absolute()
    folder = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_if_remote(staging: Path, output: epath.Path) -> None:
    """Sends what is staged to a remote output, config.json last; no more than one shard lies on the local disk."""
    if not _is_remote(output):
        return
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        epath.Path(file).copy(output / file.name, overwrite=True)
        file.unlink()


def _finish(staging: Path, output: epath.Path) -> None:
    """Puts the complete export under its name."""
    if _is_remote(output):
        _move_if_remote(staging, output)
    else:
        staging.rename(Path(output).absolute())  # replaces an empty directory
