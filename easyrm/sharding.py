"""Where every array lies: the mesh, the rule table, and the placement of state and batches.

Mesh axes: `dp` replicates the model, `fsdp` shards parameters and rows, `mp` shards heads and MLP width
(tensor parallelism) and the residual stream along the row.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easyrm.errors import InputError

AXES = ("dp", "fsdp", "mp")
ROW_AXES = ("dp", "fsdp")

# Exactly one rule matches each parameter path; Adam's moments end in the same paths. Kernels are [layers, in, out].
# The embedding is split by width alone, so that no vocabulary size is out of place; what is small is replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"model/embed_tokens/weight$", PartitionSpec(None, ("fsdp", "mp"))),
    (r"self_attn/[qkv]_proj/kernel$", PartitionSpec(None, "fsdp", "mp")),
    (r"self_attn/o_proj/kernel$", PartitionSpec(None, "mp", "fsdp")),
    (r"mlp/(gate|up)_proj/kernel$", PartitionSpec(None, "fsdp", "mp")),
    (r"mlp/down_proj/kernel$", PartitionSpec(None, "mp", "fsdp")),
    (r"model/layers/\w+_layernorm/weight$", PartitionSpec()),
    (r"model/norm/weight$", PartitionSpec()),
    (r"score/kernel$", PartitionSpec()),
)


def parse_mesh_dim(mesh_dim: str, devices: int) -> tuple[int, int, int]:
    """Sizes of (dp, fsdp, mp) from "1,-1,8" or "dp:1,fsdp:-1,mp:8"; one -1 takes what the other two leave.

    Raises InputError where the text cannot be read or the sizes do not multiply to the number of devices.
    """
    parts = [part.strip() for part in mesh_dim.split(",")]
    named = dict(part.split(":", 1) for part in parts if ":" in part)
    if named and (len(named) != len(parts) or set(named) - set(AXES)):
        raise InputError(f"--mesh_dim={mesh_dim}: axes are named dp, fsdp and mp, each once, as in dp:1,fsdp:-1,mp:8")
    texts = [named.get(axis, "1") for axis in AXES] if named else parts
    try:
        sizes = [int(text) for text in texts]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"--mesh_dim={mesh_dim}: expected three positive sizes, dp,fsdp,mp, at most one of them -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise InputError(
            f"--mesh_dim={mesh_dim} does not fit {devices} device{'s' * (devices != 1)}: the product of dp, fsdp and "
            f"mp must be {devices}, for example --mesh_dim=1,-1,1"
        )
    return tuple(sizes)


def _product(mesh_dim: str) -> int:
    """The devices that a mesh names; 0 where it leaves that open or cannot be read."""
    sizes = [part.split(":")[-1].strip() for part in mesh_dim.split(",")]
    return math.prod(map(int, sizes)) if all(size.isdigit() for size in sizes) else 0


def make_mesh(mesh_dim: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `--mesh_dim` over all devices (or those given); axes are Auto, so that jit places the rest.

    Emulated CPU devices cost nothing: there, a mesh may take the first few. Accelerators are never left idle.
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        wanted = _product(mesh_dim)
        devices = devices[:wanted] if wanted and len(devices) % wanted == 0 else devices
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise InputError(
            f"the devices are {len(slices)} TPU slices, and a run takes one: start it on one of them, or ask for one "
            "larger slice in place of several (MEGASCALE_NUM_SLICES)"
        )
    sizes = parse_mesh_dim(mesh_dim, len(devices))
    # An axis of the mesh may take part of an axis of the torus: 1,2,8 on 4x4 chips.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_groups(mesh: Mesh) -> int:
    """How many groups of devices hold different rows."""
    return mesh.shape["dp"] * mesh.shape["fsdp"]


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's key path as "model/layers/self_attn/q_proj/kernel"; NNX's closing `.value` is left out."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def spec_of(path: str) -> PartitionSpec:
    """The one rule that matches a parameter's path. Raises ValueError unless exactly one does."""
    matches = [spec for pattern, spec in RULES if re.search(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"{path}: {len(matches)} sharding rules match, expected 1")
    return matches[0]


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for each array of a state: by the rule table, scalars (Adam's count) replicated.

    Raises InputError where an axis does not divide the dimension that it shards.
    """

    def place(path, leaf):
        spec = spec_of(path_name(path)) if leaf.ndim else PartitionSpec()
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                raise InputError(
                    f"--mesh_dim: {'*'.join(axes)}={ways} does not divide a dimension of {size} in {path_name(path)}; "
                    f"use sizes that divide {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def check_heads(mesh: Mesh, num_attention_heads: int, num_key_value_heads: int) -> None:
    """Raise InputError unless mp divides both head counts: a head stays whole on one device."""
    ways = mesh.shape["mp"]
    for name, heads in (
        ("num_key_value_heads", num_key_value_heads),
        ("num_attention_heads", num_attention_heads),
    ):
        if heads % ways:
            fitting = [size for size in range(1, heads + 1) if heads % size == 0 and num_attention_heads % size == 0]
            choices = ", ".join(map(str, fitting))
            raise InputError(f"--mesh_dim: mp={ways} does not divide {name}={heads}; use mp in {{{choices}}}")


def residual_sharding(mesh: Mesh) -> NamedSharding:
    """Of the residual stream [R, L, D]: rows over dp and fsdp, the row's length over mp."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, "mp", None))


def over_devices(mesh: Mesh, attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attention` on each device's own rows and heads: q, k, v [R, L, heads, H], first_key, last_key [R, L]."""
    heads, keys = PartitionSpec(ROW_AXES, None, "mp", None), PartitionSpec(ROW_AXES, None)
    return jax.shard_map(
        attention, mesh=mesh, in_specs=(heads, heads, heads, keys, keys), out_specs=heads, check_vma=False
    )


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """Of a batch of rows: row arrays [M, R, L] over dp and fsdp, the small pair arrays [M, B] on every device."""
    rows = NamedSharding(mesh, PartitionSpec(None, ROW_AXES, None))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: rows if leaf.ndim == 3 else everywhere, batch)


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays, the same on every process, to global arrays: each process hands over what its devices hold."""

    def place(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    with jax.transfer_guard_host_to_device("allow"):  # the one place where data goes to the devices
        return jax.tree.map(place, batch, batch_shardings(mesh, batch))
