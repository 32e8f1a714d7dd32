"""Several hosts read rows of their own of one model and exchange them: every part arrives where the mesh has it."""

import itertools
import math
import sys

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from runs import outputs_of, start_programs
from test_hf_load import assert_loaded, load, save_hf

from easyrm.hf.resharding import by_rows
from easyrm.sharding import RULES, make_mesh

MESHES = ["8,1,1", "1,8,1", "1,1,8", "2,2,2", "1,4,2", "4,1,2"]


def test_every_rule_on_every_mesh_whatever_the_sizes():
    specs = {spec: 2 if "embed" in pattern else 3 for pattern, spec in RULES if len(spec)}
    exchanged = 0
    for mesh, (spec, ndim), (x, y) in itertools.product(
        map(make_mesh, MESHES), specs.items(), [(8, 16), (24, 12), (6, 20), (20, 4)]
    ):
        sharding, shape = NamedSharding(mesh, spec), (3, x, y)[-ndim:]
        if any(size % ways(mesh, axes) for size, axes in zip(shape, spec, strict=False)):
            continue
        array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for rows, columns in ((ndim - 1, ndim - 2), (ndim - 2, ndim - 1)):
            read, exchange = by_rows(sharding, shape, rows, columns)
            leaf = jax.make_array_from_callback(shape, read, lambda index, array=array: array[index])
            leaf = exchange(leaf) if exchange else leaf
            exchanged += bool(exchange)
            assert leaf.sharding.is_equivalent_to(sharding, ndim)
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, array[shard.index])
    assert exchanged > 50


def ways(mesh, axes):
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


@pytest.mark.parametrize("mesh_dim", ["8,1,1", "1,8,1", "1,4,2", "2,2,2"])
def test_several_hosts_read_rows_of_their_own_and_exchange_them(tmp_path, monkeypatch, mesh_dim):
    tensors = save_hf(tmp_path, intermediate_size=64)
    read = {}

    def watched(sharding, shape, rows, columns):
        read[shape], exchange = by_rows(sharding, shape, rows, columns)
        spans = [index[rows].indices(shape[rows])[:2] for index in read[shape].devices_indices_map(shape).values()]
        if shape[rows] % 8 == 0:
            assert sorted(spans) == [(i * shape[rows] // 8, (i + 1) * shape[rows] // 8) for i in range(8)]
        return read[shape], exchange

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("easyrm.hf.load.by_rows", watched)
    params = load(tmp_path, mesh_dim)
    assert_loaded(params, tensors)
    assert {(3, 32, 64), (3, 64, 32), (96, 32), (32, 1)} <= read.keys()
    monkeypatch.undo()
    for path, leaf in load(tmp_path, mesh_dim).items():
        assert leaf.sharding.is_equivalent_to(params[path].sharding, leaf.ndim), path


def test_a_dimension_that_the_devices_do_not_divide_is_read_by_fewer(tmp_path, monkeypatch):
    tensors = save_hf(tmp_path, vocab_size=100, num_attention_heads=2, num_key_value_heads=2, head_dim=6)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for mesh_dim in ("2,2,2", "1,4,2", "1,8,1"):
        assert_loaded(load(tmp_path, mesh_dim), tensors)


_APART = """
import jax
from flax import nnx
from easyrm.distributed import start_distributed
from easyrm.flags import run_command
from easyrm.hf.config import read_config
from easyrm.hf.load import load_params
from easyrm.models.reward import RewardModel
from easyrm.sharding import make_mesh, state_shardings

def main():
    start_distributed("auto", 60)
    folder = f"{folder}/{{jax.process_index()}}/hf"
    config, _ = read_config(folder)
    abstract = jax.eval_shape(lambda key: RewardModel(config, nnx.Rngs(key)), jax.random.key(0))
    load_params(folder, abstract, state_shardings(make_mesh("1,4,2"), abstract), config=config)

run_command(main)
"""


def test_hosts_with_different_files_are_refused(tmp_path):
    """Each would give rows of its own model, and where one alone has digests, its devices would wait for ever."""
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        save_hf(tmp_path / str(index) / "hf", dtype=dtype)
    processes = start_programs(2, [sys.executable, "-c", _APART.format(folder=tmp_path)])
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert "processes disagree (model): " in output and "BF16" in output
