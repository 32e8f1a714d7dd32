"""Runs on ranked responses, and on labels that are not certain, from end to end."""

import itertools
import json
import random

import jax
import numpy as np
import pytest
from runs import make_pairs, make_world, run, run_config, sentence, tiny_llama, write_lines

from easyrm.data.batches import Batches
from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError
from easyrm.planning.workload import demand_of_inputs, typical_demand, work_on
from easyrm.training.evaluation import METRICS, evaluate
from easyrm.training.inputs import Inputs
from easyrm.training.loss import LossConfig


def make_groups(n, seed=0):
    """Groups of two to five responses, ranked by how many words of the question they repeat; some have ties."""
    rng, groups = random.Random(seed), []
    for i in range(n):
        question = sentence(rng, 4, 9)
        k = 2 + i % 4
        responses = [" ".join([sentence(rng, 1, 4), *[question.split()[-1]] * (k - j), f"{i} {j}"]) for j in range(k)]
        ranks = {"ranks": [*range(k - 1), k - 2]} if i % 4 == 3 else {}
        groups.append({"prompt": question, "responses": responses, "id": i, **ranks})
    return groups


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    settings = make_world(folder, 16)
    write_lines(folder / "groups.jsonl", [*make_groups(15), {"prompt": "x", "responses": ["y", "z"], "ranks": [1, 1]}])
    settings |= {"data.train": str(folder / "groups.jsonl"), "data.batch_size": 5, "num_epochs": 4.0}
    return {**settings, "optimizer.lr": 3e-3, "save_freq": 0}, folder


@pytest.fixture(scope="module", params=["all_pairs", "plackett_luce"])
def trained(world, request):
    settings, folder = world
    settings = {**settings, "loss.type": request.param, "data.eval": settings["data.train"], "eval_freq": 3}
    return settings, run({**settings, "output_dir": str(folder / request.param)}), folder / request.param


def test_the_loss_falls(trained):
    _, lines, _ = trained
    figures = [line for line in lines if "eval/loss" in line]
    assert set(METRICS) | {"eval/pairs"} <= set(figures[0]) and figures[0]["eval/pairs"] == 15
    assert figures[-1]["eval/loss"] < 0.9 * figures[0]["eval/loss"]
    assert figures[-1]["eval/accuracy"] > figures[0]["eval/accuracy"]


def test_groups_and_tokens_are_counted_as_they_are(trained):
    """An epoch's unique tokens are those of the data, and the record accounts for every group."""
    _, lines, folder = trained
    training = [line for line in lines if "loss" in line]
    assert [line["pairs"] for line in training] == [5] * 12
    report = json.loads((folder / "config.json").read_text())["data"]["train"]
    assert (report["read"], report["kept"], report["dropped"]) == (16, 15, {"tie": 1})
    assert sum(line["tokens_unique"] for line in training[:3]) == report["tokens_unique"] < report["tokens"]
    assert all(line["tokens_computed"] >= line["tokens_unique"] for line in training)
    real = sum(line["tokens_per_second"] * line["step_time"] for line in training[:3])
    assert real == pytest.approx(report["tokens"], rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"data.micro_batches": 2, "data.packing": False}, {"data.micro_batches": 3, "mesh_dim": "1,4,2"}],
    ids=str,
)
def test_what_must_not_change_the_losses(trained, tmp_path, changes):
    settings, lines, _ = trained
    changed = run({**settings, **changes, "output_dir": str(tmp_path)})
    for name, rtol in (("loss", 1e-4), ("eval/loss", 1e-4), ("accuracy", 1e-6)):
        before, after = ([line[name] for line in some if name in line] for some in (lines, changed))
        np.testing.assert_allclose(after, before, rtol=rtol)
        np.testing.assert_allclose(after[:1], before[:1], rtol=1e-5)


def test_pairs_are_groups_of_two(world, tmp_path):
    settings, folder = world
    settings = {**settings, "data.train": str(folder / "pairs.jsonl"), "data.batch_size": 8, "num_epochs": 1.0}
    settings = {**settings, "loss.center_coef": 0.01, "data.eval": str(folder / "pairs.jsonl")}
    plain, *ranked = (
        run({**settings, "loss.type": name, "output_dir": str(tmp_path / name)})
        for name in ("bradley_terry", "all_pairs", "plackett_luce")
    )
    timed = ("step_time", "pairs_per_second", "tokens_per_second")
    for lines in ranked:
        for line, expected in zip(lines, plain, strict=True):
            for name, value in line.items():
                assert name in timed or value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_ranked_responses_under_a_loss_of_pairs(world, tmp_path):
    settings, _ = world
    with pytest.raises(InputError, match=r"groups.jsonl:1: ranked responses .*--loss.type=all_pairs"):
        run({**settings, "output_dir": str(tmp_path)})


def test_what_is_said(world, tmp_path, capsys):
    settings, _ = world
    run({**settings, "loss.type": "all_pairs", "num_epochs": 1.0, "total_steps": 1, "output_dir": str(tmp_path)})
    said = capsys.readouterr().out
    assert "1 steps of 5 groups: 5 groups, 0.33 epochs" in said
    assert "16 groups read = 5 trained on + 1 tie + 10 not reached" in said


def test_soft_labels(world, tmp_path, capsys):
    """A probability of 1, or none at all, is a label; without any there is nothing to be soft."""
    settings = {**world[0], "num_epochs": 1.0, "data.batch_size": 8}
    given = {"none": lambda i: None, "one": lambda i: None if i % 2 else 1, "some": lambda i: 0.25 + 0.5 * (i % 2)}
    losses = {}
    for name, probability in given.items():
        path = write_lines(tmp_path / f"{name}.jsonl", make_pairs(16, probability=probability))
        mine = {**settings, "data.train": str(path), "loss.soft_labels": name != "none"}
        losses[name] = [line["loss"] for line in run({**mine, "output_dir": str(tmp_path / name)})]
    assert "note: 8 of 16 pairs have no probability and get 1" in capsys.readouterr().out
    np.testing.assert_allclose(losses["one"], losses["none"], rtol=1e-6)
    assert np.abs(np.subtract(losses["some"], losses["none"])).min() > 1e-3
    with pytest.raises(InputError, match=r"--loss\.soft_labels uses probabilities and no pair has one"):
        none = str(tmp_path / "none.jsonl")
        run({**settings, "data.train": none, "loss.soft_labels": True, "output_dir": str(tmp_path / "refused")})


@pytest.mark.parametrize("name", ["bradley_terry", "all_pairs"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_evaluated_rewards_are_in_the_order_of_the_data(world, name, micro_batches):
    """Here the reward of a conversation is its length."""
    settings, folder = world
    loss = LossConfig(type=name)
    data = DataConfig(max_length=320, batch_size=5, micro_batches=micro_batches)
    path = folder / ("groups.jsonl" if loss.ranked else "pairs.jsonl")
    store = build_store(str(path), load_tokenizer(settings["tokenizer"]), data, ranked=loss.ranked)
    orders = [np.arange(at, min(at + 5, len(store))) for at in range(0, len(store), 5)]
    batches = Batches(store, data, orders, row_groups=2, pad_id=0)

    def rewards_of(batch):
        micro = np.arange(micro_batches)[:, None]
        ends = ((batch.chosen_row, batch.chosen_column), (batch.rejected_row, batch.rejected_column))
        return tuple((batch.positions[micro, row, column] + 1).astype(np.float32) for row, column in ends)

    expected, right = [], []
    for i in range(len(store)):
        units = store.group(i) if loss.ranked else [store[i]]
        sides = [(len(side), rank) for unit in units for side, rank in zip(unit[:2], unit.ranks, strict=True)]
        mine = [(a, b) for (a, x), (b, y) in itertools.product(sides, repeat=2) if 0 <= x < y]
        expected += mine
        right.append(np.mean([a > b for a, b in mine]))
    found = evaluate(rewards_of, batches(orders), loss)
    np.testing.assert_array_equal(np.stack([found.chosen, found.rejected], axis=-1), expected)
    assert found.chosen.dtype == np.float32 and found.figures["eval/pairs"] == len(store)
    assert found.figures["eval/accuracy"] == pytest.approx(np.mean(right))
    asked = iter([False, True])
    assert evaluate(rewards_of, batches(orders), loss, lambda: next(asked)) is None


def test_a_plan_compiles_what_the_run_would(world):
    settings, _ = world
    config = run_config({**settings, "loss.type": "plackett_luce", "output_dir": "unused", "data.micro_batches": 2})
    tokenizer = load_tokenizer(config.tokenizer)
    inputs = Inputs(config, tokenizer, tiny_llama(), row_groups=2, say=lambda line: None)
    demand = demand_of_inputs(config, inputs)
    rows = work_on(demand, config, 2, 2).rows(config.data.batch_size)
    real = inputs.train.empty(max(inputs.train.shapes, key=lambda shape: shape.capacity))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rows) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    report = inputs.train.store.report
    assert demand.pairs == 15 and demand.tokens == pytest.approx(5 * report["tokens_unique"] / 15)
    assert typical_demand(config, 0, 100).width == 1
