"""The model card says what was recorded and measured, says so where nothing was, and cannot be broken by any text."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from runs import make_world, run
from test_evaluation_files import SCORES, report

from easyrm.config import RunConfig
from easyrm.errors import InputError
from easyrm.evaluation_files import evaluations_of, write_evaluation
from easyrm.hf.card import model_card

RECORD = {
    "config": {
        "seed": 7,
        "dtype": "bf16",
        "license": "",
        "total_steps": 0,
        "num_epochs": 1.0,
        "model": {"init_from": "hf://allenai/tulu-2-13b", "config": ""},
        "optimizer": {"lr": 5e-6, "end_lr": 0.0, "warmup_ratio": 0.03, "b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "loss": {"type": "bradley_terry", "center_coef": 0.01},
        "data": {"train": "a|b.jsonl", "eval": "", "batch_size": 64, "max_length": 4096},
    },
    "model": {"hidden_size": 64, "rope_theta": 500000.0, "rope_scaling": None},
    "data": {
        "train": {
            "files": ["pairs.jsonl.gz"],
            "read": 4408,
            "kept": 4400,
            "dropped": {"identical": 5, "overlong": 3},
            "longest": 3071,
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
    {"step": 34, "eval/loss": 0.66, "eval/accuracy": 0.625},
    {"step": 68, "loss": 0.5321, "accuracy": 0.75},
    {"step": 68, "eval/loss": 0.64, "eval/accuracy": 0.6875},
]
EXAMPLE = "<s><|user|>\nHi\n<|assistant|>\nHello</s>"
REWARDBENCH = {"score": 0.7021, "chat": 0.9637, "chat_hard": 0.5637, "safety": 0.6583, "reasoning": 0.6228}
HOSTILE = "a|b\\|c`d` <b>*x*</b> </details>\n---\n# h\r\n- [l](u): &amp; 'é\u2028\x7f\ud800😀\" $y$ _z_ ~~s~~ ```"


def card_of(record=RECORD, evaluations=(), metrics=METRICS, name="my-rm", step=68):
    return model_card(record, metrics, list(evaluations), name=name, step=step, dtype="bf16", example=EXAMPLE)


def with_config(**settings):
    return {**RECORD, "config": {**RECORD["config"], **settings}}


def front_matter(card):
    """The metadata as YAML, as the hub's own library reads it, and the rest of the card."""
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), ModelCard(card).data, body


def rows(card):
    """The cells of each line of a table."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in lines]


def cells(card):
    return {row[0].replace("\\", ""): row[1].replace("\\", "") for row in rows(card) if len(row) == 2}


def test_the_card_holds_the_record():
    card = card_of()
    matter, _, body = front_matter(card)
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
        "learning rate": "5e-06",
        "batch size, pairs": "64",
        "optimizer": "AdamW with betas=(0.9, 0.999) and epsilon=1e-08",
        "epochs": "1.0",
        "optimizer steps": "68 of 68",
        "loss": "0.5321",
        "seed": "7",
        "data.train": "a|b.jsonl",
        "data.eval": '""',
        "rope_scaling": "null",
        "pairs read": "4408",
        "pairs kept": "4400",
        "pairs dropped: identical": "5",
        "pairs dropped: overlong": "3",
        "fingerprint": "abc123",
        "eval/accuracy": "0.6875",
        "jax": "0.10.2",
    }.items():
        assert shown[key] == value, key
    assert "| loss | bradley_terry (center_coef 0.01) |" in body
    assert "easyrm 0.1.0" in body and "Optimizer steps: 68 of 68" in body and "8 x TPU v5p" in body
    assert json.dumps(EXAMPLE) in body and "newline after `<|assistant|>` matters" in body


def test_a_step_on_the_way_shows_nothing_of_later_ones():
    body = card_of(step=34)
    assert "Optimizer steps: 34 of 68" in body
    assert "0.71" in body and "0.625" in body and "0.5321" not in body and "0.6875" not in body


def test_what_is_not_known_is_not_invented():
    card = card_of({"config": {"model": {"init_from": ""}}}, metrics=[], step=3)
    matter, _, body = front_matter(card)
    assert set(matter) == {"library_name", "pipeline_tag", "tags"}
    assert "random weights" in body
    assert "Optimizer steps: 3\n" in body
    assert body.count("None was made.") == 2
    assert "## Training data\n\nNot recorded." in body
    assert "Licence: not stated." in body and "were not recorded" in body
    assert ["my-rm", *["–"] * 5] in rows(body) and "Not measured at step 3." in body  # noqa: RUF001


def test_a_local_base_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    card = card_of({"config": {"model": {"init_from": "runs/base"}}})
    assert "base_model" not in front_matter(card)[0]
    assert "`runs/base`" in card


def test_hub_data_and_the_stated_licence_are_metadata():
    train = "hf://allenai/tulu-2.5-preference-data:hh_rlhf_60k, pairs.jsonl,hf://squad,hf://a b"
    matter, data, body = front_matter(card_of(with_config(license="Apache-2.0", data={"train": train})))
    assert data.datasets == matter["datasets"] == ["allenai/tulu-2.5-preference-data", "squad"]
    assert data.license == "apache-2.0" and "Licence: `Apache-2.0`" in body and "not stated" not in body


@pytest.mark.parametrize("license", ["apache 2.0", "mit\n", "a|b"])
def test_a_licence_that_is_no_id_is_refused(license):
    with pytest.raises(InputError, match="--license="):
        RunConfig(output_dir="x", license=license).validate()


def test_the_figures_are_printed_as_the_published_cards_do_and_are_metadata():
    bench = report(
        suite="rewardbench",
        name="rewardbench",
        source="hf://allenai/reward-bench:filtered",
        figures={**REWARDBENCH, "accuracy": 0.6444, "ties": 3},
        subsets={"alpacaeval-easy": {"count": 100, "correct": 97, "ties": 0, "accuracy": 0.97, "interval": [0.915, 1]}},
    )
    pairs = report(length={"pairs": 10, "favoured": 0.7, "chosen": 0.5})
    _, data, body = front_matter(card_of(evaluations=[pairs, bench]))
    assert ["Model", "Score", "Chat", "Chat Hard", "Safety", "Reasoning"] in rows(body)
    assert ["my-rm", "70.2", "96.4", "56.4", "65.8", "62.3"] in rows(body)
    assert ["alpacaeval-easy", "100", "97", "97.0", "91.5 to 100.0", "0"] in rows(body)
    assert ["74.1", "70.0 to 78.0", "18", "1", "+0.250"] in rows(body)
    for words in (
        "Score is the mean of the four sections",
        "A tie counts as wrong; ties: 3.",
        "18 of 20 records of `heldout.jsonl` scored; dropped: 2 overlong.",
        "Evaluator: easyrm 0.1.0; compute in bf16; at most 512 tokens a conversation",
        "the longer one got the higher reward in 70.0 %, and was the chosen one in 50.0 %",
    ):
        assert words in body, words
    assert "The longest conversation in the training data: 3071 tokens." in body
    assert "Not measured" not in body and body.index("### RewardBench") < body.index("### Held-out pairs")

    assert data.model_name == "my-rm"
    found = {(result.dataset_type, result.metric_name): result for result in data.eval_results}
    score, accuracy = found["allenai/reward-bench", "Score"], found["eval", "Accuracy"]
    assert {name: result.metric_value for (of, name), result in found.items() if of != "eval"} == {
        "Score": 70.2,
        "Chat": 96.4,
        "Chat Hard": 56.4,
        "Safety": 65.8,
        "Reasoning": 62.3,
        "Accuracy": 64.4,
    }
    assert (score.task_type, score.dataset_name, score.dataset_split) == (
        "text-classification",
        "RewardBench",
        "filtered",
    )
    assert score.metric_type == "accuracy" and score.source_name == "easyrm 0.1.0 on allenai/reward-bench"
    assert accuracy.dataset_name == "Held-out pairs" and data.eval_results[0] == score
    assert (accuracy.metric_value, accuracy.dataset_args["evaluator"]) == (74.1, "easyrm 0.1.0")
    assert found["eval", "Mean Reward Difference"].metric_value == 0.25


def test_two_evaluations_on_one_suite_stay_apart():
    first = report(suite="rewardbench", name="rewardbench", figures={"chat": 0.9})
    _, data, body = front_matter(
        card_of(evaluations=[first, {**first, "name": "rewardbench-2", "figures": {"chat": 0.5}}])
    )
    values = {(result.dataset_name, result.dataset_type): result.metric_value for result in data.eval_results}
    assert values == {
        ("RewardBench", "allenai/reward-bench"): 90.0,
        ("RewardBench (rewardbench-2)", "rewardbench-2"): 50.0,
    }
    assert "### RewardBench (rewardbench-2)\n" in body


def test_a_section_that_was_not_measured_is_a_dash_and_no_metadata():
    bench = report(suite="rewardbench", name="rewardbench", figures={"chat": 0.9})
    _, data, body = front_matter(card_of(evaluations=[bench]))
    assert ["my-rm", "–", "90.0", "–", "–", "–"] in rows(body)  # noqa: RUF001
    assert [result.metric_name for result in data.eval_results] == ["Chat"]


@pytest.mark.parametrize(
    ("suite", "figures", "row"),
    [
        ("rewardbench2", {"score": 0.7, "precise_if": 0.25, "ties": 0.5}, {"Score": "70.0", "Precise IF": "25.0"}),
        ("rm-bench", {"score": 0.7, "hard": 0.4, "code": 0.55}, {"Score": "70.0", "Hard": "40.0", "Code": "55.0"}),
    ],
)
def test_other_suites_have_their_own_columns(suite, figures, row):
    _, data, body = front_matter(card_of(evaluations=[report(suite=suite, name=suite, figures=figures)]))
    head = next(line for line in rows(body) if set(row) <= set(line))
    shown = dict(zip(head, rows(body)[rows(body).index(head) + 2], strict=True))
    assert shown.items() >= row.items()
    assert len(data.eval_results) == len(figures) and "Not measured at step 68." in body


def test_no_text_breaks_the_card():
    """Neither tables, headings, lists and folded parts, nor the metadata; and every word can still be read."""

    def evaluation(name, **more):
        return report(name=name, subsets={name: {"count": 1, "accuracy": 1.0}}, **more)

    def card(text):
        config = {**RECORD["config"], "data": {"train": text}, "model": {"init_from": text}}
        record = {**RECORD, "config": config, "devices": text, "data": {text: RECORD["data"]["train"]}}
        bench = evaluation("rewardbench", suite="rewardbench", source=text, dropped={text: 2})
        return card_of(record, [bench, evaluation(text)], metrics=[{"step": 1, "loss": 1, text: 1}], name=text)

    def form(card):
        """What each line begins with, how many cells it has, and whether its code is closed."""
        lines = card.split("\n---\n", 1)[1].split("\n")
        return [(re.match(r"[^\w\\]*", line)[0][:2], len(re.findall(r"(?<!\\)`", line))) for line in lines], list(
            map(len, rows(card))
        )

    hostile = card(HOSTILE)
    hostile.encode()  # as the file is written
    assert form(hostile) == form(card("plain"))
    _, data, _ = front_matter(hostile)
    assert data.model_name == HOSTILE and len(data.eval_results) == 3
    name = next(row[0] for row in rows(hostile) if row[1:] == ["–"] * 5)  # noqa: RUF001
    assert re.sub(r"\\(.)", r"\1", name) == " ".join(HOSTILE.replace("\ud800", "?").split())


def test_an_export_has_the_evaluations_of_its_step(tmp_path, capsys):
    """And none is lost for one that is broken."""
    output = tmp_path / "my-rm"
    for step in (1, 2):
        write_evaluation(evaluations_of(output, step), report(step=step, name=f"of-{step}"), SCORES)
    (evaluations_of(output, 2) / "broken.json").write_text("{")
    flags = {"output_dir": str(output), "total_steps": 2, "export": True, "license": "mit"}
    run(make_world(tmp_path, pairs=8) | flags)
    _, data, body = front_matter((output / "export" / "README.md").read_text())
    assert [result.dataset_name for result in data.eval_results] == ["Pairs: of-2"] * 2
    assert (data.model_name, data.license) == ("my-rm", "mit") and "of-1" not in body
    assert "broken.json: not a whole evaluation of step 2" in capsys.readouterr().out
