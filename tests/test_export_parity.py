"""Rewards of an export, in transformers on torch, are those that easyrm computes, on real pairs too."""

import gzip
import json

import numpy as np
import pytest
import torch
from runs import TINY_MODEL, call, make_pairs, make_world, run, write_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LLAMA31 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
SHAPES = {
    "llama2": {"num_key_value_heads": 4},
    "llama3.1": LLAMA31,
    "llama3.2": {**LLAMA31, "tie_word_embeddings": True, "head_dim": 16},
}


def torch_rewards(directory, conversations, batch_size, side):
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    rewards = []
    for start in range(0, len(conversations), batch_size):
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations[start : start + batch_size]]
        with torch.no_grad():
            rewards += model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    return np.array(rewards)


def check(directory, pairs, tmp_path):
    """easyrm.score on the export against transformers, at every batch size and padding side."""
    write_lines(tmp_path / "scored.jsonl", pairs)
    result = call(
        "score",
        {
            "model": directory,
            "input": tmp_path / "scored.jsonl",
            "output": tmp_path / "scores.jsonl",
            "dtype": "fp32",
            "max_length": 512,
        },
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [pair["id"] for pair in pairs]
    ours = np.array([line[side] for line in lines for side in ("chosen", "rejected")])
    conversations = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert ours.std() > 0.01
    for batch_size, side in ((1, "right"), (8, "left"), (8, "right")):
        np.testing.assert_allclose(torch_rewards(directory, conversations, batch_size, side), ours, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_made_pairs(tmp_path, shape):
    settings = make_world(tmp_path, pairs=16)
    (tmp_path / "config.json").write_text(json.dumps(TINY_MODEL | SHAPES[shape]))
    output = tmp_path / "run"
    run({**settings, "output_dir": str(output), "export": True, "export_dtype": "fp32", "optimizer.warmup_ratio": 0.0})
    check(output / "export", make_pairs(12, seed=5), tmp_path)


def test_real_pairs(tmp_path, shared):
    with gzip.open(shared / "data" / "hh_train.jsonl.gz", "rt") as file:
        pairs = [json.loads(line) for line in file]
    pairs = [pair for pair in pairs if len(json.dumps(pair)) < 800][:64]
    settings = make_world(tmp_path, pairs=16)
    for name, init in {
        "golden": {"model.init_from": shared / "golden" / "init_llama2", "tokenizer": shared / "golden" / "tokenizer"},
        "stories260K": {"model.init_from": shared / "checkpoints" / "stories260K", "tokenizer": ""},
    }.items():
        output = tmp_path / name
        settings |= {key: str(value) for key, value in init.items()} | {"model.config": ""}
        run({**settings, "output_dir": str(output), "total_steps": 2, "export": True, "export_dtype": "fp32"})
        check(output / "export", pairs, tmp_path)
