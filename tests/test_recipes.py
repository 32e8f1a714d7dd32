"""The recipes: they are flags of train_rm, say what the model cards say, and name the slice they were planned on."""

import re

import pytest
from absl import flags

from easyrm.config import RECIPES, RunConfig, apply_recipe, read_recipe
from easyrm.errors import InputError
from easyrm.flags import define_run_flags, run_config
from easyrm.models.config import SIZES
from easyrm.planning.model import model_shape
from easyrm.planning.topology import parse_topology
from easyrm.sharding import parse_mesh_dim

CARDS = {
    "tulu2.5-13b-hh-rlhf-60k": ("llama2-13b", 512, 1e-5, 1e-6),
    "tulu2.5-13b-uf": ("llama2-13b", 512, 1e-5, 1e-6),
    "llama3.1-tulu2-8b-uf": ("llama3.1-8b", 64, 5e-6, 0.0),
    "llama3.1-tulu2-70b-uf": ("llama3.1-70b", 64, 5e-6, 0.0),
}


def recipe(name: str) -> RunConfig:
    config = RunConfig(output_dir="somewhere")
    apply_recipe(config, read_recipe(name), name)
    return config


def test_recipes_are_part_of_the_package():
    """find: takes folders with an __init__.py alone; a wheel without it would hold no recipe."""
    assert (RECIPES / "__init__.py").exists()


def test_every_recipe_is_checked_here():
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_trains_what_its_card_says(name):
    config = recipe(name)
    config.validate()
    size, batch_size, lr, end_lr = CARDS[name]
    optimizer = config.optimizer
    assert model_shape(config.model) == SIZES[size]
    assert (config.data.batch_size, config.data.max_length, config.num_epochs) == (batch_size, 4096, 1.0)
    assert (optimizer.lr, optimizer.end_lr, optimizer.warmup_ratio) == (lr, end_lr, 0.03)
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_names_the_slice_it_was_planned_on(name):
    text = (RECIPES / f"{name}.toml").read_text()
    planned = re.search(r"^# Planned on (v\w+:[\dx]+): peak ([\d.]+) of ([\d.]+) GiB", text, re.MULTILINE)
    assert planned, f"{name} does not say what it was planned on"
    tpu = parse_topology(planned[1])
    assert float(planned[2]) < float(planned[3]) == pytest.approx(tpu.chip.hbm / 2**30, abs=0.005)
    assert parse_mesh_dim(recipe(name).mesh_dim, tpu.chips)


@pytest.mark.parametrize(("group", "name"), [("loss", "ranked"), ("loss", "validate"), ("data", "to_dict"), ("", "x")])
def test_a_recipe_sets_flags_alone(group, name):
    with pytest.raises(InputError, match=f"--recipe=mine: it sets '{name}', which is no flag"):
        apply_recipe(RunConfig(), {group: {name: True}} if group else {name: True}, "mine")


def test_flags_beside_a_recipe_win():
    values = flags.FlagValues()
    argv = ["train_rm", "--recipe=llama3.1-tulu2-8b-uf", "--optimizer.lr=3e-6", "--mesh_dim=1,8,2"]
    define_run_flags(values, argv)
    values(argv)
    config = run_config(values)
    assert (config.optimizer.lr, config.mesh_dim) == (3e-6, "1,8,2")
    assert (config.data.batch_size, config.model.init_from) == (64, "hf://allenai/llama-3.1-tulu-2-8b")
