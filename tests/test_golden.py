"""The recorded figures of the ancestor's own trainer, reproduced step by step on the same weights and pairs."""

import gzip
import json

import numpy as np
import pytest
from runs import lines_of, run

NAMES = {"gradient_norm": "grad_norm", "train_margin": "margin"}


def replay(shared, tmp_path, pairs, **settings):
    golden = shared / "golden"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return run(
        {
            "model.init_from": str(golden / "init_llama2"),
            "tokenizer": str(golden / "tokenizer" / "tokenizer.model"),
            "data.train": str(tmp_path / "pairs.jsonl"),
            "data.shuffle": False,
            "data.batch_size": 8,
            "data.max_length": 512,
            "dtype": "fp32",
            "optimizer.lr": 1e-3,
            "optimizer.b2": 0.95,
            "mesh_dim": "1,1,1",
            "output_dir": str(tmp_path / "run"),
            **settings,
        }
    )


def golden_pairs(shared):
    with gzip.open(shared / "golden" / "pairs480.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def check(lines, recorded, steps):
    assert len(lines) == len(recorded) == steps
    for line, expected in zip(lines, recorded, strict=True):
        step = expected["step"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5 if step <= 30 else 1e-4), step
        for name in ("gradient_norm", "param_norm"):
            assert line[NAMES.get(name, name)] == pytest.approx(expected[name], rel=1e-3), (step, name)
        for name in (
            "chosen_reward_mean",
            "rejected_reward_mean",
            "chosen_reward_std",
            "rejected_reward_std",
            "train_margin",
        ):
            assert line[NAMES.get(name, name)] == pytest.approx(expected[name], abs=1e-3), (step, name)
        assert line["accuracy"] == pytest.approx(expected["accuracy"])
    # The ancestor printed the rate of the next update.
    rates = [0.0] + [expected["learning_rate"] for expected in recorded[:-1]]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "layout", [{}, {"data.packing": False}, {"data.micro_batches": 4}], ids=["packed", "padded", "accumulated"]
)
def test_all_sixty_steps(shared, tmp_path, layout):
    recorded = json.loads((shared / "golden" / "easylm_fork_llama2.json").read_text())["steps"]
    check(replay(shared, tmp_path, golden_pairs(shared), **layout), recorded, 60)
    assert {line["step"] for line in lines_of(tmp_path / "run")} == set(range(1, 61))


def test_with_a_margin(shared, tmp_path):
    pairs = [{**pair, "margin": 0.5} for pair in golden_pairs(shared)[:24]]
    recorded = json.loads((shared / "golden" / "easylm_fork_llama2_margin.json").read_text())["steps"]
    check(replay(shared, tmp_path, pairs, **{"loss.margin": True}), recorded, 3)
