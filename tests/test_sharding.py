"""The mesh, the rule table, and where things really lie."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import VARIANTS, random_model
from flax import nnx

from easyrm.errors import InputError
from easyrm.models.config import SIZES
from easyrm.models.reward import RewardModel
from easyrm.sharding import check_heads, make_mesh, parse_mesh_dim, path_name, spec_of, state_shardings
from easyrm.training.optimizer import OptimizerConfig, make_optimizer


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1,-1,8", (1, 4, 8)),
        ("-1,1,1", (32, 1, 1)),
        ("dp:1,fsdp:-1,mp:2", (1, 16, 2)),
        ("2,8,2", (2, 8, 2)),
        ("mp:2,fsdp:2,dp:-1", (8, 2, 2)),
    ],
)
def test_mesh_dim(text, sizes):
    assert parse_mesh_dim(text, 32) == sizes


@pytest.mark.parametrize(
    "text", ["1,-1,-1", "1,3,-1", "2,2,2", "1,1", "a,b,c", "0,-1,1", "dp:1,tp:-1,mp:8", "1,-2,1", ""]
)
def test_mesh_dim_refused(text):
    with pytest.raises(InputError, match="--mesh_dim"):
        parse_mesh_dim(text, 32)


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.1-70b", "llama3.1-405b", "llama3.2-1b"])
def test_exactly_one_rule_for_each_parameter_and_moment(name):
    model = jax.eval_shape(lambda key: RewardModel(SIZES[name], nnx.Rngs(key)), jax.random.key(0))
    moments = jax.eval_shape(make_optimizer(OptimizerConfig(), 1).init, model)
    paths = [path_name(path) for path, leaf in jax.tree_util.tree_flatten_with_path((model, moments))[0] if leaf.ndim]
    assert len(paths) == 3 * 12
    for path in paths:
        spec_of(path)
    with pytest.raises(ValueError, match="0 sharding rules match"):
        spec_of("model/layers/self_attn/q_proj/bias")


def test_several_slices_are_refused():
    chip = {"platform": "tpu", "device_kind": "TPU v5p"}
    devices = [SimpleNamespace(**chip, slice_index=index // 4) for index in range(8)]
    with pytest.raises(InputError, match="2 TPU slices"):
        make_mesh("1,-1,1", devices)


def test_large_parameters_are_split_over_all_of_fsdp_and_mp():
    mesh = make_mesh("1,4,2")
    shardings = state_shardings(mesh, random_model(VARIANTS["gqa"]))
    for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]:
        small = "norm" in path_name(path) or "score" in path_name(path)
        assert sharding.is_fully_replicated == small, path_name(path)
        if not small:
            assert np.prod(sharding.shard_shape((3, 64, 64))[-2:]) == 64 * 64 // 8


def test_what_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"mp=4 does not divide num_key_value_heads=2; use mp in \{1, 2\}"):
        check_heads(make_mesh("1,2,4"), 8, 2)
    model = jax.eval_shape(lambda: random_model(VARIANTS["mqa_head_dim"]))  # mlp width 56, D 32
    with pytest.raises(InputError, match=r"fsdp.*=8 does not divide"):
        state_shardings(
            make_mesh("1,8,1"), jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, 36, 36), leaf.dtype), model)
        )
