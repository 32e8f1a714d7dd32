"""An EasyLM checkpoint becomes the same model in a Hugging Face directory, or one line says why it cannot."""

import dataclasses
import gzip
import json
import tracemalloc

import jax
import numpy as np
import pytest
import torch
from easylm_ancestor import forward, from_hugging_face, make_arrays, tree, write_stream
from etils.epath import backend
from flax import serialization
from fsspec.implementations.memory import MemoryFileSystem
from runs import call, make_pairs, make_tokenizer, write_lines
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from easyrm.data.tokenizer import load_tokenizer
from easyrm.hf import easylm_file
from easyrm.hf.config import read_config
from easyrm.hf.easylm import import_model
from easyrm.hf.source import ModelSource
from easyrm.models.config import LlamaConfig
from easyrm.sharding import make_mesh
from easyrm.training.program import abstract_model

GQA = LlamaConfig(320, 32, 56, 2, 4, 2, rope_theta=5e4, rms_norm_eps=1e-3)
HF_CONFIG = {"model_type": "llama", **dataclasses.asdict(GQA)}
TOKENS = [1, 5, 9, 33, 200, 319, 7, 7, 64, 2]
TRAIN_STATE = [
    ("step", np.array(7)),
    ("opt_state/0/mu/transformer/wte/embedding", np.ones((9, 9), np.float32)),
    ("opt_state/0/count", np.int32(3)),
    ("opt_state/1/none", None),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def imported(checkpoint, tokenizer, output, config=GQA, dtype="fp32", **settings):
    said = []
    import_model(checkpoint, config, load_tokenizer(str(tokenizer)), output, dtype=dtype, say=said.append, **settings)
    return said


def in_torch(directory, kind=AutoModelForSequenceClassification):
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_transformers_computes_what_the_interleaved_rotation_gives(tmp_path, tokenizer, heads, dtype):
    config = LlamaConfig(320, 32, 56, 2, 4, heads, rope_theta=5e4, rms_norm_eps=1e-3)
    arrays = make_arrays(config, dtype=dtype)
    imported(f"params::{write_stream(tmp_path / 'p', arrays)}", tokenizer, tmp_path / "hf", config)
    expected = forward(arrays, TOKENS, config)[-1]
    np.testing.assert_allclose(logits(in_torch(tmp_path / "hf"), TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert abs(expected[0] - forward(arrays, TOKENS[1:], config)[-1, 0]) > 1e-2
    assert read_config(tmp_path / "hf")[0].rms_norm_eps == 1e-3
    abstract = abstract_model(config, make_mesh("2,4,1"))
    ModelSource(str(tmp_path / "hf"), "").load(abstract, score_std=0.0, seed=0)  # compares digests.json


def test_bf16_is_written_as_it_was_read(tmp_path, tokenizer):
    arrays = make_arrays(GQA, dtype="bf16")
    imported(f"params::{write_stream(tmp_path / 'p', arrays)}", tokenizer, tmp_path / "hf", dtype="bf16")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], arrays["transformer/wte/embedding"])
    np.testing.assert_array_equal(tensors["score.weight"], arrays["score/kernel"].T)
    for i in range(2):
        kernel = arrays[f"transformer/h/{i}/feed_forward/w2/kernel"]
        np.testing.assert_array_equal(tensors[f"model.layers.{i}.mlp.down_proj.weight"], kernel.T)


def test_recorded_rewards_of_the_ancestor(tmp_path, shared):
    golden = shared / "golden"
    config, _ = read_config(golden / "init_llama2")
    tensors = load_file(golden / "init_llama2" / "model.safetensors")
    arrays = from_hugging_face(tensors, config)
    imported(f"params::{write_stream(tmp_path / 'p', arrays)}", golden / "tokenizer", tmp_path / "hf", config)
    recorded = json.loads((golden / "initial_rewards_llama2.json").read_text())
    with gzip.open(golden / "pairs480.jsonl.gz", "rt") as file:
        pairs = [json.loads(next(file)) for _ in range(16)]
    names, model = AutoTokenizer.from_pretrained(tmp_path / "hf"), in_torch(tmp_path / "hf")
    for side in ("chosen", "rejected"):
        ids = [names.apply_chat_template(pair[side], return_dict=False) for pair in pairs]
        np.testing.assert_allclose([logits(model, one)[0] for one in ids], recorded[side], atol=1e-5)
        # The forward pass of these tests is the ancestor's.
        np.testing.assert_allclose(
            [forward(arrays, one, config)[-1, 0] for one in ids[:4]], recorded[side][:4], atol=1e-5
        )
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_every_form_of_the_file_gives_the_same_directory(tmp_path, tokenizer, monkeypatch):
    arrays = make_arrays(GQA)
    forms = {
        "plain": f"params::{write_stream(tmp_path / 'plain', arrays)}",
        "upstream": f"params::{write_stream(tmp_path / 'upstream', arrays, 'params/')}",
        "chunked by the fork": f"params::{write_stream(tmp_path / 'fork', arrays, limit=777)}",
    }
    state = write_stream(tmp_path / "state", arrays, "params/params/", TRAIN_STATE, limit=5000)
    forms |= {kind: f"{kind}::{state}" for kind in ("trainstate", "trainstate_params")}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    forms["chunked by flax"] = f"params::{write_stream(tmp_path / 'flax', arrays)}"
    forms["chunked by both"] = f"params::{write_stream(tmp_path / 'both', arrays, limit=701)}"
    for name, holder in {"flax_params": arrays, "wrapped": {f"params/{key}": a for key, a in arrays.items()}}.items():
        (tmp_path / name).write_bytes(serialization.to_bytes(tree(holder)))
        forms[name] = f"flax_params::{tmp_path / name}"
    monkeypatch.setattr(easylm_file, "_BLOCK_BYTES", 500)  # chunks end within blocks, and blocks within chunks
    for name, checkpoint in forms.items():
        said = imported(checkpoint, tokenizer, tmp_path / "out" / name)
        assert any(line.startswith("skipped 4 entries") for line in said) == name.startswith("trainstate")
        for file in ("model.safetensors", "digests.json", "config.json"):
            plain = (tmp_path / "out" / "plain" / file).read_bytes()
            assert (tmp_path / "out" / name / file).read_bytes() == plain, (name, file)
    arrays["transformer/wte/embedding"] = arrays["transformer/wte/embedding"][::-1].copy()
    imported(f"params::{write_stream(tmp_path / 'q', arrays)}", tokenizer, tmp_path / "out" / "q")
    assert (tmp_path / "out" / "q" / "digests.json").read_bytes() != (
        tmp_path / "out" / "plain" / "digests.json"
    ).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_model_is_one_to_train_from(tmp_path, tokenizer, tied):
    config = LlamaConfig(320, 32, 56, 2, 4, 2, tie_word_embeddings=tied)
    head = "" if tied else "lm_head"
    arrays = make_arrays(config, head)
    imported(
        f"params::{write_stream(tmp_path / 'p', arrays)}", tokenizer, tmp_path / "hf", config, max_shard_bytes=9999
    )
    model = in_torch(tmp_path / "hf", AutoModelForCausalLM)
    np.testing.assert_allclose(logits(model, TOKENS), forward(arrays, TOKENS, config, head), rtol=1e-4, atol=1e-4)
    params = ModelSource(str(tmp_path / "hf"), "").load(
        abstract_model(config, make_mesh("1,1,1", jax.devices()[:1])), score_std=0.0, seed=0
    )
    np.testing.assert_array_equal(params.model.norm.weight, arrays["transformer/ln_f/kernel"])


def test_no_more_than_a_shard_is_held(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(easylm_file, "_BLOCK_BYTES", 2**16)
    config = LlamaConfig(320, 512, 1024, 8, 4)  # 20 million values, 80 MB; the largest array has 2 MB
    checkpoint = f"params::{write_stream(tmp_path / 'p', make_arrays(config))}"
    peaks = {}
    for limit in (10**9, 4 * 10**6):  # the first compiles
        tracemalloc.start()
        imported(checkpoint, tokenizer, tmp_path / str(limit), config, max_shard_bytes=limit)
        peaks[limit] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[4 * 10**6] < 5 * 10**6 < 80 * 10**6 < peaks[10**9]


class Bucket(MemoryFileSystem):
    """gs:// in memory."""

    protocol, store, pseudo_dirs = ("gs",), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


def test_from_a_bucket_to_a_bucket(tmp_path, tokenizer, monkeypatch):
    bucket, others = Bucket(), backend.fsspec_backend._get_filesystem
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: bucket if name == "gcs" else others(name)
    )
    arrays = make_arrays(GQA)
    write_stream(tmp_path / "p", arrays)
    bucket.pipe_file("gs://b/p", (tmp_path / "p").read_bytes())
    imported("params::gs://b/p", tokenizer, "gs://b/hf", max_shard_bytes=20_000)
    imported(f"params::{tmp_path / 'p'}", tokenizer, tmp_path / "hf", max_shard_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    for file in (tmp_path / "hf").iterdir():
        assert bucket.cat_file(f"gs://b/hf/{file.name}") == file.read_bytes(), file.name


def test_the_command(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    arrays = make_arrays(GQA, dtype="bf16")
    flags = {
        "checkpoint": f"trainstate_params::{write_stream(tmp_path / 's', arrays, 'params/params/', TRAIN_STATE)}",
        "config": tmp_path / "config.json",
        "tokenizer": tokenizer,
        "output": tmp_path / "hf",
    }
    result = call("import_easylm", flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"imported to {tmp_path / 'hf'} (bf16)"
    pairs = write_lines(tmp_path / "pairs.jsonl", make_pairs(6))
    scored = {"model": tmp_path / "hf", "input": pairs, "output": tmp_path / "scores.jsonl", "dtype": "fp32"}
    result = call("score", scored)
    assert result.returncode == 0, result.stderr
    names = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for line, pair in zip((tmp_path / "scores.jsonl").read_text().splitlines(), make_pairs(6), strict=True):
        for side in ("chosen", "rejected"):
            ids = names.apply_chat_template(pair[side], return_dict=False)
            assert json.loads(line)[side] == pytest.approx(forward(arrays, ids, GQA)[-1, 0], abs=1e-3)
    again = call("import_easylm", flags)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [
        f"easyrm: {tmp_path / 'hf'}: exists and is not empty; choose another output or remove it"
    ]
