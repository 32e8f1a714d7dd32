"""One run on many meshes, and on two processes: the same losses, and everything where the table says."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from runs import TINY_MODEL, lines_of, make_world, outputs_of, run, start_two
from transformers import LlamaConfig, LlamaForSequenceClassification

from easyrm.sharding import path_name, spec_of
from easyrm.training import program as programs

MESHES = ["8,1,1", "1,8,1", "1,4,2", "2,2,2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**TINY_MODEL, num_labels=1, pad_token_id=0)).save_pretrained(
        folder / "base"
    )
    settings = {**make_world(folder), "model.config": "", "model.init_from": str(folder / "base")}
    settings |= {"total_steps": 10, "data.batch_size": 8, "save_freq": 0}
    alone = run({**settings, "output_dir": str(folder / "alone")})
    return folder, settings, alone


def check_same(lines, alone):
    assert len(lines) == len(alone) == 10
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in alone], rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], [line["grad_norm"] for line in alone], rtol=1e-3)
    assert [line["tokens_unique"] for line in lines] == [line["tokens_unique"] for line in alone]


@pytest.mark.parametrize("mesh_dim", MESHES)
def test_the_same_losses_on_every_mesh(world, tmp_path, mesh_dim, monkeypatch):
    _, settings, alone = world
    states = []
    step = programs.Program.train_step

    def watched(self, state, batch):
        with jax.transfer_guard("disallow"):  # nothing crosses unasked
            state, metrics = step(self, state, batch)
        states[:] = [state]
        return state, metrics

    monkeypatch.setattr(programs.Program, "train_step", watched)
    settings = {**settings, "mesh_dim": mesh_dim, "output_dir": str(tmp_path)}
    check_same(run(settings), alone)
    for path, leaf in jax.tree_util.tree_flatten_with_path(states[0])[0]:
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(
                jax.NamedSharding(leaf.sharding.mesh, spec_of(path_name(path))), leaf.ndim
            )
            replicated = "norm" in path_name(path) or "score" in path_name(path) or mesh_dim == "8,1,1"
            assert (leaf.addressable_shards[0].data.size < leaf.size) != replicated, path_name(path)


def test_micro_batches_change_nothing_but_rounding(world, tmp_path):
    _, settings, alone = world
    check_same(run({**settings, "data.micro_batches": 4, "mesh_dim": "1,2,1", "output_dir": str(tmp_path)}), alone)


def test_two_processes_of_four_devices(world, tmp_path):
    _, settings, alone = world
    settings = {**settings, "mesh_dim": "1,4,2", "output_dir": str(tmp_path / "run"), "export": "true"}
    settings["export_dtype"] = "fp32"
    processes = start_two(settings)
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_same(lines_of(tmp_path / "run"), alone)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mesh"] == {"dp": 1, "fsdp": 4, "mp": 2}
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert "step 10/10" in outputs[0] and "step 10/10" not in outputs[1]


def test_no_step_compiles(world, tmp_path, monkeypatch):
    """Every shape is compiled before the first step."""
    _, settings, _ = world
    compilations, inside, step = [], [], programs.Program.train_step
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None
    )

    def counted(self, state, batch):
        before = len(compilations)
        state, metrics = step(self, state, batch)
        inside.append(len(compilations) - before)
        return state, metrics

    monkeypatch.setattr(programs.Program, "train_step", counted)
    run({**settings, "total_steps": 3, "seed": 5, "output_dir": str(tmp_path)})
    assert inside == [0, 0, 0] and len(compilations) > 0


def test_bf16_on_a_mesh(world, tmp_path):
    """The CPU's own bf16 product, with its operands sharded every way."""
    _, settings, alone = world
    losses = [
        [
            line["loss"]
            for line in run({**settings, "dtype": "bf16", "mesh_dim": dim, "output_dir": str(tmp_path / dim)})
        ]
        for dim in ("1,1,1", "2,2,2")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    np.testing.assert_allclose(losses[0], [line["loss"] for line in alone], rtol=2e-2)


def test_a_mesh_without_rows_for_all_devices_is_noted(world, tmp_path, capsys):
    _, settings, _ = world
    few = {**settings, "data.batch_size": 3, "total_steps": 1, "mesh_dim": "1,8,1"}
    run({**few, "output_dir": str(tmp_path / "few")})
    assert re.search(r"note: the pairs of a step fill [1-7] of 8 groups of devices", capsys.readouterr().out)
    run({**few, "mesh_dim": "1,1,1", "output_dir": str(tmp_path / "one")})
    assert "the rest is padding" not in capsys.readouterr().out
