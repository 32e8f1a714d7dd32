"""The model card says what the record says, and says so where the record is silent."""

import json

import yaml

from easyrm.hf.card import model_card

RECORD = {
    "config": {
        "seed": 7,
        "dtype": "bf16",
        "model": {"init_from": "hf://allenai/tulu-2-13b", "config": ""},
        "optimizer": {"lr": 5e-6, "b2": 0.999},
        "data": {"train": "a|b.jsonl", "eval": ""},
    },
    "model": {"hidden_size": 64, "rope_theta": 500000.0, "rope_scaling": None},
    "data": {
        "train": {
            "files": ["pairs.jsonl.gz"],
            "read": 4408,
            "kept": 4400,
            "dropped": {"identical": 5, "overlong": 3},
            "tokens": 1000,
            "tokens_unique": 700,
            "fingerprint": "abc123",
        },
        "eval": None,
    },
    "versions": {"easyrm": "0.1.0", "jax": "0.10.2"},
    "total_steps": 68,
    "mesh": {"dp": 1, "fsdp": 4, "mp": 2},
    "devices": "8 x TPU v5p",
}
METRICS = [
    {"step": 1, "loss": 0.71, "accuracy": 0.5},
    {"step": 50, "eval/loss": 0.66, "eval/accuracy": 0.625},
    {"step": 68, "loss": 0.5321, "accuracy": 0.75},
]
EXAMPLE = "<s><|user|>\nHi\n<|assistant|>\nHello</s>"


def front_matter(card):
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def cells(card):
    rows = [line.strip("| ").split(" | ") for line in card.replace("\\|", "/").splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_card_holds_the_record():
    card = model_card(RECORD, METRICS, example=EXAMPLE)
    matter, body = front_matter(card)
    assert matter == {
        "base_model": "allenai/tulu-2-13b",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "easyrm"],
    }
    shown = cells(body)
    for key, value in {
        "optimizer.lr": "5e-06",
        "optimizer.b2": "0.999",
        "seed": "7",
        "data.train": "a/b.jsonl",
        "data.eval": '""',
        "rope_scaling": "null",
        "pairs read": "4408",
        "pairs kept": "4400",
        "pairs dropped: identical": "5",
        "pairs dropped: overlong": "3",
        "fingerprint": "abc123",
        "loss": "0.5321",
        "eval/accuracy": "0.625",
        "jax": "0.10.2",
    }.items():
        assert shown[key] == value, key
    assert "easyrm 0.1.0" in body and "Optimizer steps: 68" in body and "8 x TPU v5p" in body
    assert json.dumps(EXAMPLE) in body


def test_what_is_not_known_is_not_invented():
    card = model_card({"config": {"model": {"init_from": ""}}}, [], example=EXAMPLE)
    matter, body = front_matter(card)
    assert "base_model" not in matter
    assert "random weights" in body
    assert "Optimizer steps: not recorded" in body
    assert body.count("None was made.") == 2
    assert "## Data\n\nNot recorded." in body


def test_a_local_base_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    card = model_card({"config": {"model": {"init_from": "runs/base"}}}, [], example=EXAMPLE)
    assert "base_model" not in front_matter(card)[0]
    assert "`runs/base`" in card
