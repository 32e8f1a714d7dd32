"""An export is what transformers loads whole, holds the trained bits, and is there complete or not at all."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import VARIANTS
from etils import epath
from flax import nnx
from runs import outputs_of, start_programs
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from easyrm.errors import InputError
from easyrm.hf.config import read_config
from easyrm.hf.directory import plan_shards
from easyrm.hf.export import export
from easyrm.hf.load import load_params
from easyrm.models.config import SIZES, LlamaConfig
from easyrm.models.reward import RewardModel
from easyrm.sharding import make_mesh, state_shardings

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.tensor([[1, 5, 9, 33, 2, 0, 0], [1, 7, 7, 8, 9, 90, 2]])


def abstract_model(config):
    return jax.eval_shape(lambda key: RewardModel(config, nnx.Rngs(key)), jax.random.key(0))


def random_model(config):
    """Parameters from numpy: nothing to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype("f4")), abstract_model(config))


def write_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{}")


def write(params, config, output, **options):
    given = {"raw_config": IDS, "write_tokenizer": write_tokenizer, "card": "# A card\n", "dtype": "fp32"} | options
    export(params, config, output, **given)


def load_again(directory, mesh_dim="1,1,1"):
    config, _ = read_config(directory)
    devices = jax.devices()[: np.prod([int(size) for size in mesh_dim.split(",")])]
    abstract = abstract_model(config)
    shardings = state_shardings(make_mesh(mesh_dim, devices), abstract)
    return load_params(directory, abstract, shardings, config=config)


def in_transformers(directory):
    """The export as transformers loads it; fails unless every tensor found its place."""
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_equal(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_all_of_it_and_import_gives_the_same_bits(tmp_path, variant):
    config = VARIANTS[variant]
    model = random_model(config)
    write(model, config, tmp_path / "hf")
    theirs = in_transformers(tmp_path / "hf").state_dict()
    assert len(theirs) == 3 + 9 * config.num_hidden_layers
    np.testing.assert_array_equal(theirs["score.weight"], np.asarray(model.score.kernel).T)
    np.testing.assert_array_equal(theirs["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    for i, ours in enumerate(np.asarray(model.model.layers.mlp.down_proj.kernel)):
        np.testing.assert_array_equal(theirs[f"model.layers.{i}.mlp.down_proj.weight"], ours.T)
    assert read_config(tmp_path / "hf")[0] == config
    assert_equal(load_again(tmp_path / "hf"), model)


def test_transformers_pools_at_the_last_token_before_padding(tmp_path):
    config = VARIANTS["gqa"]
    write(random_model(config), config, tmp_path / "hf")
    model = in_transformers(tmp_path / "hf")
    with torch.no_grad():
        padded = model(TOKENS, attention_mask=(TOKENS != 0).long()).logits
        alone = model(TOKENS[:1, :5]).logits
    assert padded.shape == (2, 1)
    torch.testing.assert_close(padded[:1], alone)
    assert abs(padded[0] - padded[1]) > 1e-3


def test_bf16_is_rounded_as_torch_rounds(tmp_path):
    config = VARIANTS["llama2"]
    model = random_model(config)
    # Halfway cases tell rounding to even from rounding up.
    ties = (np.arange(96 * 32, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32).reshape(96, 32)
    model.model.embed_tokens.weight = nnx.Param(jax.numpy.asarray(ties))
    write(model, config, tmp_path / "fp32")
    write(model, config, tmp_path / "bf16", dtype="bf16")
    full, rounded = in_transformers(tmp_path / "fp32").state_dict(), in_transformers(tmp_path / "bf16").state_dict()
    for name, tensor in full.items():
        assert tensor.dtype == torch.float32 and rounded[name].dtype == torch.bfloat16
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name
    assert read_config(tmp_path / "bf16")[1]["torch_dtype"] == "bfloat16"
    imported = load_again(tmp_path / "bf16")  # by digests.json, each the rounded one
    np.testing.assert_array_equal(imported.model.norm.weight, rounded["model.norm.weight"].float())


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards_keep_to_the_limit_and_load(tmp_path, limit):
    config = VARIANTS["gqa"]
    model = random_model(config)
    write(model, config, tmp_path / "hf", max_shard_bytes=limit)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == {1: 30, 20_000: 8, 10**9: 1}[limit]
    names = []
    for file in files:
        tensors = load_file(file)
        names += tensors
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        header = file.read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    assert len(names) == len(set(names)) == 30
    index = tmp_path / "hf" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert set(content["weight_map"]) == set(names)
    in_transformers(tmp_path / "hf")
    assert_equal(load_again(tmp_path / "hf"), model)


def test_a_70b_is_cut_into_shards_of_five_gigabytes():
    plan = plan_shards(SIZES["llama3.1-70b"], "bf16", 5 * 10**9)
    assert len(plan) >= 29  # 141 GB
    assert next(iter(plan)) == f"model-00001-of-{len(plan):05d}.safetensors"
    assert sum(map(len, plan.values())) == 3 + 9 * 80


def test_a_sharded_state_exports_the_same_files(tmp_path):
    config = VARIANTS["gqa"]
    model = random_model(config)
    write(model, config, tmp_path / "one")
    placed = jax.device_put(model, state_shardings(make_mesh("2,2,2"), model))
    write(placed, config, tmp_path / "eight")
    for file in ("model.safetensors", "config.json", "digests.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "eight" / file).read_bytes()


def test_a_crash_leaves_nothing_and_what_a_kill_leaves_is_cleared(tmp_path):
    config = VARIANTS["llama2"]
    model = random_model(config)

    def crash(directory):
        assert (directory / "model.safetensors").exists()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write(model, config, tmp_path / "hf", write_tokenizer=crash)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".hf.unfinished"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_text("half")
    write(model, config, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "digests.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "hf" / "README.md").read_text() == "# A card\n"


def test_where_nothing_can_be_renamed_config_json_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr("easyrm.hf.directory.is_remote", lambda path: True)
    config = VARIANTS["llama2"]
    model = random_model(config)
    copied, local = [], type(epath.Path(tmp_path))
    copy = local.copy
    monkeypatch.setattr(local, "copy", lambda file, to, **rest: (copied.append(to.name), copy(file, to, **rest)))
    write(model, config, tmp_path / "hf", max_shard_bytes=20_000)
    assert copied[0] == "model-00001-of-00008.safetensors"
    assert copied[-1] == "config.json"
    assert sorted(copied) == sorted(file.name for file in (tmp_path / "hf").iterdir())
    assert_equal(load_again(tmp_path / "hf"), model)


_TURNS = """
import sys
from pathlib import Path
import jax
from flax import nnx
from easyrm.distributed import start_distributed, together
from easyrm.hf import directory, export as exports
from easyrm.models.config import LlamaConfig
from easyrm.models.reward import RewardModel
from easyrm.sharding import make_mesh, state_shardings
start_distributed("auto", 60)
config = LlamaConfig(96, 32, 56, 3, 4)
def new(key): return RewardModel(config, nnx.Rngs(key))
places = state_shardings(make_mesh("1,4,2"), jax.eval_shape(new, jax.random.key(0)))
written, save = [], directory.save_file
directory.save_file = lambda tensors, path, **rest: (written.append(path.name), save(tensors, path, **rest))
output = Path(sys.argv[1])
if sys.argv[2] == "apart" and jax.process_index() == 1:  # another disk, on which an earlier export was killed
    output = output.with_name("of_host_1") / "hf"
    output.with_name(".hf.unfinished").mkdir(parents=True)
with together():
    exports.export(
        jax.jit(new, out_shardings=places)(jax.random.key(0)), config, output, card="# A card", dtype="fp32",
        raw_config={"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}, max_shard_bytes=20_000,
        write_tokenizer=lambda folder: (folder / "tokenizer.json").write_text("{}"),
    )
print(",".join(written))
"""


@pytest.mark.parametrize("disks", ["one", "apart"])
def test_two_hosts_take_turns_where_both_see_the_disk(tmp_path, disks):
    processes = start_programs(2, [sys.executable, "-c", _TURNS, str(tmp_path / "hf"), disks])
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    written = [[name for name in output.splitlines()[-1].split(",") if name] for output in outputs]
    files = [path.name for path in sorted((tmp_path / "hf").glob("*.safetensors"))]
    assert len(files) == 8
    assert written == ([files[::2], files[1::2]] if disks == "one" else [files, []])
    config = LlamaConfig(96, 32, 56, 3, 4)
    assert_equal(
        load_again(tmp_path / "hf"), jax.jit(lambda key: RewardModel(config, nnx.Rngs(key)))(jax.random.key(0))
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "of_host_1"}
    assert not list(tmp_path.glob("hf/.*")) and not list(tmp_path.glob("of_host_1/*/*"))


def test_bad_output_and_bad_ids_are_refused_and_nothing_is_written(tmp_path):
    config = VARIANTS["llama2"]
    model = random_model(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        write(model, config, tmp_path / "mine")
    with pytest.raises(InputError, match="also the EOS"):
        write(model, config, tmp_path / "hf", raw_config=IDS | {"pad_token_id": 2})
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    write(model, config, tmp_path / "empty")
    in_transformers(tmp_path / "empty")


def test_real_weights_come_back_bit_for_bit(tmp_path, shared):
    source = shared / "golden" / "init_llama2"
    config, raw = read_config(source)
    write(load_again(source, "1,4,2"), config, tmp_path / "hf", raw_config=raw)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    with torch.no_grad():
        logits = [in_transformers(path)(TOKENS).logits for path in (source, tmp_path / "hf")]
    assert torch.equal(*logits)
