"""Parameters from a Hugging Face checkpoint: each host reads what its devices hold, and never the whole model."""

import gc
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from easyrm.agreement import agree
from easyrm.digests import digests
from easyrm.errors import InputError
from easyrm.file_digests import check_parameter, recorded_parameters
from easyrm.hf.config import is_classifier, read_config
from easyrm.hf.hub import fetch
from easyrm.hf.names import BUFFERS, LM_HEAD, SCORE_PATH, Weight, weights
from easyrm.hf.resharding import by_rows
from easyrm.hf.safetensors import DTYPES, Checkpoint
from easyrm.models.config import LlamaConfig
from easyrm.sharding import path_name

# Layers read at once: file reads and conversions overlap, and each holds one chunk of a file.
_READERS = 4
# Rows converted at once: a transposed write of few rows stays in the processor's cache.
_ROW_BLOCK = 64
# JAX lets go of a host's copy only at a garbage collection; one takes too long to be worth it for small leaves.
_COLLECT_BYTES = 2**26

Bounds = tuple[tuple[int, int], ...]


def load_params(
    source: str | epath.PathLike,
    abstract_params: Any,
    shardings: Any,
    *,
    config: LlamaConfig,
    score_std: float = 0.0,
    seed: int = 0,
) -> Any:
    """The parameters of a checkpoint, fp32, as a pytree like `abstract_params`, placed by `shardings`.

    `source` is anything that `fetch` takes. From a causal model the LM head is dropped and the score head is new:
    normal with standard deviation `score_std` (0: 1/sqrt(hidden_size + 1)), from `jax.random.key(seed)`, the same on
    every mesh. From a sequence classifier the head is loaded. The host holds the shards of one leaf at a time beside
    what is already placed, and 32 MB of file contents.

    Raises InputError, before any tensor is read, that names every missing, unexpected and mis-shaped tensor, and where
    several processes find different files; and for a parameter that is not finite, or not the one that the digests.json
    of an export tells of.
    """
    path = fetch(source)
    checkpoint, has_head = open_checkpoint(path, config)
    recorded, table = recorded_parameters(path), weights(config)
    # Of the hub, the directory's name is the commit.
    tensors = {name: [entry.dtype, entry.file.name, entry.start] for name, entry in checkpoint.entries.items()}
    agree({"directory": path.name, "tensors": tensors, "digests.json": recorded}, "model")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params)
    jobs = [
        (path_name(key), leaf, where) for (key, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    for name, leaf, _ in jobs:
        if leaf.shape != table[name].leaf_shape:
            raise ValueError(f"{name}: shape {leaf.shape} where the configuration gives {table[name].leaf_shape}")
    loaded: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(_READERS) as readers:
        # The largest first: a host that is also the device holds a leaf twice while it is placed.
        for name, leaf, where in sorted(jobs, key=lambda job: -math.prod(job[1].shape)):
            if name == SCORE_PATH and not has_head:
                loaded[name] = _new_head(leaf.shape, score_std or (config.hidden_size + 1) ** -0.5, seed, where)
            else:
                loaded[name] = _load_leaf(checkpoint, table[name], where, readers)
            if not jax.device_get(_all_finite(loaded[name])):
                raise InputError(f"{path}: {name} holds what is not a finite number; get the weights again")
            if recorded:
                check_parameter(path, name, digests({name: loaded[name]})[name], recorded)
            if loaded[name].nbytes > _COLLECT_BYTES:
                gc.collect()
    return jax.tree.unflatten(treedef, [loaded[name] for name, _, _ in jobs])


def open_checkpoint(source: str | epath.PathLike, config: LlamaConfig) -> tuple[Checkpoint, bool]:
    """(checkpoint, whether it has a score head), with only file headers read. Raises InputError as `load_params`."""
    path = fetch(source)
    _, raw = read_config(path)
    checkpoint, has_head = Checkpoint(path), is_classifier(raw)
    _check_tensors(path, checkpoint, weights(config), has_head)
    return checkpoint, has_head


def _check_tensors(path: epath.Path, checkpoint: Checkpoint, table: dict[str, Weight], has_head: bool) -> None:
    """InputError that names all tensors which are missing, not expected, or of another shape or dtype."""
    expected = {
        name: weight.shape for leaf, weight in table.items() if has_head or leaf != SCORE_PATH for name in weight.names
    }
    problems = []
    for name, shape in expected.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            problems.append(f"missing {name} {list(shape)}")
        elif entry.shape != shape:
            problems.append(f"mis-shaped {name} {list(entry.shape)}, expected {list(shape)}")
        elif entry.dtype not in DTYPES:
            problems.append(f"{name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
    for name, entry in checkpoint.entries.items():
        dropped = BUFFERS.search(name) or (name == LM_HEAD and not has_head)
        if name not in expected and not dropped:
            problems.append(f"unexpected {name} {list(entry.shape)}")
    if problems:
        raise InputError(f"{path}: the weights do not fit config.json; correct either one: {'; '.join(problems)}")


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _new_head(shape: tuple[int, ...], std: float, seed: int, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.jit(lambda key: std * jax.random.normal(key, shape), out_shardings=sharding)(jax.random.key(seed))


def _load_leaf(
    checkpoint: Checkpoint, weight: Weight, sharding: jax.sharding.Sharding, readers: ThreadPoolExecutor
) -> jax.Array:
    """One leaf, placed. Every distinct shard of this host's devices is filled in a single pass over the file.

    Hosts read rows of their own and exchange them: their devices' parts of most kernels lie in every row of a file.
    """
    shape, exchange = weight.leaf_shape, None
    if jax.process_count() > 1 and len(weight.shape) == 2:
        columns, rows = (-2, -1) if weight.transposed else (-1, -2)
        sharding, exchange = by_rows(sharding, shape, rows % len(shape), columns % len(shape))
    indices = sharding.addressable_devices_indices_map(shape).values()
    shards = {
        bounds: np.empty([stop - start for start, stop in bounds], np.float32) for bounds in _distinct(indices, shape)
    }

    def read_layer(layer: int) -> None:
        targets = list(_targets(shards, weight, layer))
        if targets:
            _fill(checkpoint, weight.names[layer], targets)

    list(readers.map(read_layer, range(max(weight.layers, 1))))
    leaf = jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index, shape)])
    return exchange(leaf) if exchange else leaf


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _distinct(indices: Iterable[tuple[slice, ...]], shape: tuple[int, ...]) -> set[Bounds]:
    return {_bounds(index, shape) for index in indices}


def _targets(shards: dict[Bounds, np.ndarray], weight: Weight, layer: int) -> Iterable[tuple[Bounds, np.ndarray]]:
    """(part of the stored tensor, where it goes) for each shard that holds this layer; the view is writable."""
    for bounds, shard in shards.items():
        if weight.layers:
            (first, last), *bounds = bounds
            if not first <= layer < last:
                continue
            shard = shard[layer - first]
        yield (tuple(bounds[::-1]), shard.T) if weight.transposed else (tuple(bounds), shard)


def _fill(checkpoint: Checkpoint, name: str, targets: list[tuple[Bounds, np.ndarray]]) -> None:
    """Copies a stored tensor's parts into their fp32 targets, in one pass over the rows that they take."""
    for start, stop in _runs(bounds[0] for bounds, _ in targets):
        for at, chunk in checkpoint.rows(name, start, stop):
            for ((first, last), *columns), target in targets:
                for row in range(max(at, first), min(at + len(chunk), last), _ROW_BLOCK):
                    end = min(row + _ROW_BLOCK, at + len(chunk), last)
                    part = chunk[(slice(row - at, end - at), *(slice(*column) for column in columns))]
                    target[row - first : end - first] = part.astype(np.float32)


def _runs(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The rows of all spans, as few spans as hold them and no other row."""
    runs: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return runs
