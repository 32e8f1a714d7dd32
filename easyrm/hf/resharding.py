"""Read by the rows of a file, use as the rule table says: who reads what, and the exchange between the devices."""

import math
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

Exchange = Callable[[jax.Array], jax.Array] | None


def by_rows(sharding: NamedSharding, shape: tuple[int, ...], rows: int, columns: int) -> tuple[NamedSharding, Exchange]:
    """(how to read an array, how to bring it to `sharding`), so that no two devices read the same row of a file.

    `rows` is the dimension that lies in files row by row, `columns` the other one. Where `sharding` splits columns, or
    replicates, every device would have to read rows that others read too; so they read rows of their own, and exchange
    them over the interconnect: a gather over the axes that replicate, an all-to-all over those that split the columns.
    No device holds more than the piece it reads and the piece it keeps, twice. Where the devices do not divide the
    rows, fewer axes take part, and where none do, there is nothing to exchange (None).
    """
    mesh, spec = sharding.mesh, tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    own, across = _axes(spec[rows]), _axes(spec[columns])
    idle = tuple(axis for axis in mesh.axis_names if axis not in own + across)
    while across + idle and shape[rows] % _ways(mesh, own + across + idle):
        across, idle = (across, ()) if idle else ((), ())
    if _ways(mesh, across + idle) == 1:
        return sharding, None
    read = list(spec)
    read[rows] = own + across + idle
    if across:
        read[columns] = None

    def exchange(piece: jax.Array) -> jax.Array:
        if idle:
            piece = jax.lax.all_gather(piece, idle, axis=rows, tiled=True)
        if across:
            piece = jax.lax.all_to_all(piece, across, split_axis=columns, concat_axis=rows, tiled=True)
        return piece

    read = PartitionSpec(*read)
    moved = jax.shard_map(exchange, mesh=mesh, in_specs=read, out_specs=sharding.spec, check_vma=False)
    return NamedSharding(mesh, read), jax.jit(moved, out_shardings=sharding)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _ways(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
