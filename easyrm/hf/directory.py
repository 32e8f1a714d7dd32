"""A Hugging Face directory while it is written: its weight files, and how it gets its name when it is complete."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from easyrm.errors import InputError
from easyrm.hf.names import Weight, weights
from easyrm.models.config import LlamaConfig

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}
MAX_SHARD_BYTES = 5 * 10**9


def refuse_existing(output: str | epath.PathLike) -> epath.Path:
    """The path of a directory to be exported to. Raises InputError unless it is absent or empty."""
    output = epath.Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output}: exists and is not empty; choose another output or remove it")
    return output


def plan_shards(config: LlamaConfig, dtype: str, max_shard_bytes: int, *, causal: bool = False) -> dict[str, list[str]]:
    """Tensor names by file name, in the order of `weights`; a tensor over the limit has a file to itself."""
    groups: list[list[str]] = []
    filled = math.inf
    for weight in weights(config, causal=causal).values():
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


@contextlib.contextmanager
def staging_directory(output: epath.Path) -> Iterator[Path]:
    """A local directory to write in: beside a local output, so that a rename suffices. It is gone in the end.

    For a local output process 0 makes it, and one that a killed export left behind is removed first.
    """
    if is_remote(output):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = Path(output).absolute()
    folder = folder.with_name(f".{folder.name}.unfinished")
    if jax.process_index() > 0:
        yield folder
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_shard(staging: Path, output: epath.Path, file: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes one weight file, and sends it on where the output is a bucket."""
    save_file(tensors, staging / file, metadata={"format": "pt"})
    if is_remote(output):
        _send(staging, output)


def write_index(staging: Path, config: LlamaConfig, dtype: str, max_shard_bytes: int, *, causal: bool = False) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    plan = plan_shards(config, dtype, max_shard_bytes, causal=causal)
    if len(plan) == 1:
        return
    table = weights(config, causal=causal)
    total = sum(_tensor_bytes(weight, dtype) * len(weight.names) for weight in table.values())
    files = {name: file for file, names in plan.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def finish_directory(staging: Path, output: epath.Path) -> None:
    """Puts the complete directory under its name."""
    if is_remote(output):
        _send(staging, output)
    else:
        staging.rename(Path(output).absolute())  # replaces an empty directory


def is_remote(path: epath.Path) -> bool:
    """Whether it is in a bucket, where nothing can be renamed."""
    return "://" in str(path)


def _send(staging: Path, output: epath.Path) -> None:
    """Moves what is staged to a bucket, config.json last; no more than one shard lies on the local disk."""
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        epath.Path(file).copy(output / file.name, overwrite=True)
        file.unlink()
