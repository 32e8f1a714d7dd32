"""Bad input: one clear line, a non-zero exit, and nothing compiled."""

import importlib.util
import json
import math
import shutil
import sys

import numpy as np
import pytest
from absl import flags
from runs import call, full_disk, make_pairs, make_world, run, write_lines

from easyrm import flags as run_flags
from easyrm import run as runs_of_easyrm
from easyrm.config import read_recipe
from easyrm.errors import InputError
from easyrm.training.program import Program


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return folder, make_world(folder, pairs=12)


@pytest.fixture
def refused(world, tmp_path, monkeypatch):
    """Checks that settings are refused with one line that matches, before anything is compiled."""

    def compiled(*_):
        raise AssertionError("it compiled")

    monkeypatch.setattr(Program, "compile", compiled)

    def check(match, **settings):
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        with pytest.raises(InputError, match=match) as caught:
            run({**world[1], "output_dir": str(tmp_path / "run"), **settings})
        assert "\n" not in str(caught.value)

    return check


def test_values(refused):
    refused("--output_dir is empty", output_dir="")
    refused("--dtype=fp16: choose bf16 or fp32", dtype="fp16")
    refused("nothing to train", num_epochs=0.0)
    refused("--data.batch_size=0", data__batch_size=0)
    refused("--loss.type=listwise", loss__type="listwise")
    refused("--optimizer.b2=1.5", optimizer__b2=1.5)
    refused("--model.remat=all", model__remat="all")
    refused("give exactly one", model__init_from="/somewhere")
    refused("--log_freq=0", log_freq=0)
    for epochs in (math.inf, math.nan, -1.0):
        refused(f"--num_epochs={epochs} with", num_epochs=epochs)
    refused("--num_epochs=nan with --total_steps=3", num_epochs=math.nan, total_steps=3)
    refused(f"--seed={2**63}: choose a number below", seed=2**63)
    refused("--optimizer.eps=0.0: choose a number above 0", optimizer__eps=0.0)
    refused("--model.score_std=nan", model__score_std=math.nan)
    refused("--profile_steps=\u00b2,\u00b3: give the first", profile_steps="\u00b2,\u00b3")
    refused("--profile_steps=30,40: the run has 2 steps", profile_steps="30,40", total_steps=2)
    refused("less than one batch of --data.batch_size=100", data__batch_size=100)


def test_mesh(refused):
    refused(r"--mesh_dim=1,3,1 does not fit 8 devices", mesh_dim="1,3,1")
    refused(r"mp=4 does not divide num_key_value_heads=2; use mp in \{1, 2\}", mesh_dim="1,2,4")


def test_files(refused, tmp_path):
    refused("no such file", data__train=str(tmp_path / "nothing.jsonl"))
    run_of = tmp_path / "run of easyrm"
    run_of.mkdir()
    (run_of / "config.json").write_text('{"total_steps": 1, "tokenizer_files": {}}')
    refused("a run of easyrm, not a model; give its export", model__init_from=str(run_of), model__config="")
    refused("no such file", model__config=str(tmp_path / "config.json"))
    refused("tokenizer.*no such file", tokenizer=str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    refused("a file is in the way", output_dir=str(tmp_path / "file"))
    refused(r"--output_dir=.*file/run cannot be written \(.*Not a directory", output_dir=str(tmp_path / "file" / "run"))
    (tmp_path / "recipe.toml").write_bytes(b"seed = 1 # \xff")
    with pytest.raises(InputError, match=r"recipe.toml is not TOML: 'utf-8' codec"):
        read_recipe(str(tmp_path / "recipe.toml"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    refused("not the record of a run", output_dir=str(tmp_path / "other"))


def test_sinks_that_are_not_there(refused, monkeypatch):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"--tensorboard=true needs tensorboardX: pip install -e '\.\[tensorboard\]'", tensorboard=True)
    refused(r"--wandb_project=mine needs wandb: pip install", wandb_project="mine")


def test_a_wrong_name_is_told_before_all_data_are_read(refused, monkeypatch):
    monkeypatch.setattr("easyrm.training.inputs._read", lambda *_: 1 / 0)
    refused("rewardbnch: neither a suite", eval__suites="rewardbnch")
    refused("nothing.jsonl: no such file", data__eval="nothing.jsonl")


def test_a_disk_that_is_full(refused, monkeypatch):
    with full_disk(100):
        refused("its tokens cannot be kept in .*free space there, or set TMPDIR")
    with monkeypatch.context() as patch, full_disk(0):  # not even room to find out where
        patch.setattr("tempfile.tempdir", None)
        refused("its tokens cannot be kept in the temporary directory .*free space there, or set TMPDIR")
    write = runs_of_easyrm.write_tokenizer

    def on_a_full_disk(*arguments):
        with full_disk(100):
            write(*arguments)

    monkeypatch.setattr(runs_of_easyrm, "write_tokenizer", on_a_full_disk)
    refused(r"--output_dir=.*run cannot be written \(.*too large.*free space, or choose another directory")


def test_data(refused, tmp_path):
    pairs = make_pairs(12)
    refused("no usable pair among 0", data__train=str(write_lines(tmp_path / "empty.jsonl", [])))
    robot = json.loads(json.dumps(pairs))
    robot[3]["chosen"][0]["role"] = "robot"
    refused(
        r"robot.jsonl:4: .*'robot'.*system, user, assistant",
        data__train=str(write_lines(tmp_path / "robot.jsonl", robot)),
    )
    refused(
        r"1 of 13 records are malformed .*torn.jsonl:13.*--data.max_bad_fraction",
        data__train=str(write_lines(tmp_path / "torn.jsonl", [*pairs, '{"chosen": [{"ro'])),
    )
    refused("no pair has one", loss__margin=True)
    some = [{**pair, "margin": 1.0} for pair in pairs[:6]] + pairs[6:]
    refused(
        "6 pairs lack the margin",
        data__train=str(write_lines(tmp_path / "some.jsonl", some)),
        loss__type="scaled_bradley_terry",
    )


def test_tokenizer(refused, world, tmp_path):
    folder, _ = world
    from easyrm.data.tokenizer import load_tokenizer
    from easyrm.hf.tokenizer import write_tokenizer

    def changed(name, **settings):
        (tmp_path / name).mkdir()
        write_tokenizer(load_tokenizer(str(folder / "tokenizer.model")), tmp_path / name, 256)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            values = json.loads((tmp_path / name / file).read_text())
            values = {key: value for key, value in (values | settings).items() if value is not None}
            (tmp_path / name / file).write_text(json.dumps(values))
        return str(tmp_path / name)

    refused("no EOS token", tokenizer=changed("no_eos", eos_token=None))
    refused("also EOS.*--data.pad_token", tokenizer=changed("pad_is_eos", pad_token="</s>"))
    refused("also EOS", data__pad_token="</s>")
    small = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(small))
    refused("token id .* is beyond the model's vocab_size=100", model__config=str(tmp_path / "small.json"))


def test_weights(refused, shared, tmp_path):
    def init(name, damage):
        shutil.copytree(shared / "golden" / "init_llama2", tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        file.chmod(0o644)
        file.write_bytes(damage(file.read_bytes()))
        golden = str(shared / "golden" / "tokenizer" / "tokenizer.model")
        return {"model__init_from": str(tmp_path / name), "model__config": "", "tokenizer": golden}

    refused("model.safetensors", **init("short", lambda data: data[:-1000]))
    refused("model.safetensors", **init("noise", lambda data: np.random.default_rng(0).bytes(5000)))
    refused("model.safetensors", **init("empty", lambda data: b""))
    refused(
        r"missing model.norm.weight.*unexpected model.norn.weight",
        **init("renamed", lambda data: data.replace(b'"model.norm.weight"', b'"model.norn.weight"')),
    )


def test_recipes(tmp_path):
    (tmp_path / "good.toml").write_text("num_epochs = 2\n[optimizer]\nlr = 0.25\n[data]\nbatch_size = 8\n")
    parsed = parse(f"--recipe={tmp_path}/good.toml", "--data.batch_size=16", "--output_dir=x")
    assert (parsed.num_epochs, parsed.optimizer.lr, parsed.data.batch_size) == (2.0, 0.25, 16)
    for text, match in (
        ("lr = 1", "'lr', which is no flag"),
        ("[data]\nbatch_size = '8'", "not of type int"),
        ("a b", "not TOML"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(InputError, match=match):
            parse(f"--recipe={tmp_path}/bad.toml")
    with pytest.raises(InputError, match="--recipe=nonsense: neither a file nor a recipe"):
        parse("--recipe=nonsense")


def parse(*arguments):
    """The RunConfig of a command line, in a fresh set of flags."""
    values, argv = flags.FlagValues(), ["train_rm", *arguments]
    run_flags.define_run_flags(values, argv)
    values(argv)
    return run_flags.run_config(values)


def test_every_flag_reaches_the_configuration():
    parsed = parse(
        "--mesh_dim=dp:1,fsdp:-1,mp:2", "--loss.margin", "--data.shuffle=false", "--seed", "7", "--optimizer.lr=1"
    )
    assert parsed.mesh_dim == "dp:1,fsdp:-1,mp:2" and parsed.seed == 7
    assert parsed.loss.margin is True and parsed.data.shuffle is False and parsed.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--nonsense=1"], "nonsense"),
        (["--data.bach_size=1"], r"unknown flag --data.bach_size: did you mean --data.batch_size\?"),
        (["--model=org/name"], r"--model is a group of flags: --model.init_from, --model.config, "),
        (["-data.bach_size=1"], r"unknown flag --data.bach_size: did you mean --data.batch_size\?"),
        (["--data.batch_size=many"], "data.batch_size"),
        (["--data.batch_size=1.5"], "data.batch_size"),
        (["--loss.margin=maybe"], "loss.margin"),
        (["--seed=x"], "seed"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_the_command_line(arguments, match):
    result = call("train_rm", {}, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert match.replace("\\", "") in result.stderr
