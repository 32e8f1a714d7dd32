"""What each host of a slice reads, holds, saves and exports of a model: prints one JSON line, and needs no TPU.

    python benchmarks/scaling.py --model=llama3.1-405b --hosts=64 --chips=4 --mesh_dim=1,-1,1

Counted with the run's own rules, file by file and leaf by leaf, none of it measured. Keys, in bytes unless said:
`checkpoint` (the bf16 files that an import reads), `read` (what each host reads of them), `read_by_shards` (what it
would read if it took only its own devices' parts: most of them lie in every row of a file), `state` (parameters and
moments, fp32), `saved` (what each host writes of it, and holds while it does), `restored` (at most, on the same mesh),
`largest_leaf` (what a host holds of one parameter while it is imported), `exported`, `export_files`, and `export_turns`
(files that the busiest host writes).
"""

import argparse
import json
import math

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from easyrm.hf.directory import MAX_SHARD_BYTES, plan_shards
from easyrm.hf.names import weights
from easyrm.hf.resharding import by_rows
from easyrm.models.config import SIZES
from easyrm.models.reward import RewardModel
from easyrm.sharding import AXES, parse_mesh_dim, path_name, spec_of

BF16, FP32 = 2, 4


def of_a_host(model: str, hosts: int, chips: int, mesh_dim: str) -> dict:
    """The figures above, for `hosts` hosts of `chips` chips each."""
    config = SIZES[model]
    mesh = AbstractMesh(parse_mesh_dim(mesh_dim, hosts * chips), AXES)
    abstract = jax.eval_shape(lambda key: RewardModel(config, nnx.Rngs(key)), jax.random.key(0))
    leaves = {path_name(key): leaf.shape for key, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    table = weights(config)
    read = by_shards = largest = restored = 0
    for path, shape in leaves.items():
        placed = NamedSharding(mesh, spec_of(path))
        kept, whole = math.prod(placed.shard_shape(shape)), math.prod(shape)
        restored += min(chips * kept, whole)
        if len(table[path].shape) < 2:
            piece, rows_of_shard = whole, whole  # small, and on every device
        else:
            columns, rows = (-2, -1) if table[path].transposed else (-1, -2)
            rows, columns = rows % len(shape), columns % len(shape)
            source, _ = by_rows(placed, shape, rows, columns)
            piece = math.prod(source.shard_shape(shape))
            # A part of a row costs the row: files are read by rows.
            rows_of_shard = kept * shape[columns] // placed.shard_shape(shape)[columns]
        read += min(chips * piece, whole)
        by_shards += min(chips * rows_of_shard, whole)
        largest = max(largest, min(chips * piece, whole))
    parameters = sum(map(math.prod, leaves.values()))
    files = plan_shards(config, "bf16", MAX_SHARD_BYTES)
    return {
        "model": model,
        "parameters": parameters,
        "hosts": hosts,
        "mesh": dict(mesh.shape),
        "checkpoint": BF16 * parameters,
        "read": BF16 * read,
        "read_by_shards": BF16 * by_shards,
        "largest_leaf": FP32 * largest,
        "state": 3 * FP32 * parameters,
        "saved": 3 * FP32 * parameters // hosts,
        "restored": 3 * FP32 * restored,
        "exported": BF16 * parameters,
        "export_files": len(files),
        "export_turns": math.ceil(len(files) / hosts),
    }


def main() -> None:
    """Flags in, one JSON line out."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--model", choices=SIZES, required=True)
    flags.add_argument("--hosts", type=int, required=True)
    flags.add_argument("--chips", type=int, default=4, help="of a host")
    flags.add_argument("--mesh_dim", default="1,-1,1")
    given = flags.parse_args()
    print(json.dumps(of_a_host(given.model, given.hosts, given.chips, given.mesh_dim)))


if __name__ == "__main__":
    main()
