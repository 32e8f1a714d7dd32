"""Files of evaluations come back as they were written; what is no whole report of the step is left out, and said."""

import json

import pytest

from easyrm.evaluation_files import evaluations_of, read_evaluations, write_evaluation

SCORES = [
    {"chosen": 1.0, "rejected": 0.0, "chosen_tokens": 9, "rejected_tokens": 5},
    {"chosen": 0.0, "rejected": 1.0, "chosen_tokens": 9, "rejected_tokens": 5},
    {"chosen": 0.0, "rejected": 1.0, "chosen_tokens": 5, "rejected_tokens": 9},
    {"chosen": 1.0, "rejected": 1.0, "chosen_tokens": 5, "rejected_tokens": 9},
    {"chosen": 1.0, "rejected": 0.0, "chosen_tokens": 5, "rejected_tokens": 5},
]


def report(**changes):
    """What an evaluation on held-out pairs writes, with `changes`."""
    return {
        "suite": "pairs",
        "name": "eval",
        "source": "heldout.jsonl",
        "step": 68,
        "model": "run",
        "evaluator": "easyrm 0.1.0",
        "dtype": "bf16",
        "max_length": 512,
        "fingerprint": "0123456789abcdef",
        "read": 20,
        "scored": 18,
        "dropped": {"overlong": 2},
        "figures": {
            "accuracy": 0.7412,
            "margin": 0.25,
            "pairs": 18,
            "ties": 1,
            "interval_low": 0.7,
            "interval_high": 0.78,
        },
        "subsets": {},
    } | changes


def read(directory):
    said = []
    return read_evaluations(directory, 68, said.append), said


def test_what_was_written_is_read_with_its_figures_of_length(tmp_path):
    folder = evaluations_of(tmp_path, 68)
    write_evaluation(folder, report(), SCORES)
    write_evaluation(folder, report(suite="rm-bench", name="rm-bench", figures={"score": 0.5}, step=None), [])
    write_evaluation(evaluations_of(tmp_path, 9), report(step=9), SCORES)
    found, said = read(tmp_path)
    length = {"pairs": 4, "favoured": 0.5, "chosen": 0.5}
    assert found == [
        report(length=length),
        report(suite="rm-bench", name="rm-bench", figures={"score": 0.5}, step=None, length=None),
    ]
    assert said == []
    assert [json.loads(line) for line in (folder / "eval.scores.jsonl").read_text().splitlines()] == SCORES
    assert read_evaluations(tmp_path, 7) == []


def test_no_report_stands_beside_scores_that_are_not_its_own(tmp_path):
    def broken():
        yield SCORES[0]
        raise RuntimeError

    write_evaluation(tmp_path, report(), SCORES)
    with pytest.raises(RuntimeError):
        write_evaluation(tmp_path, report(read=99), broken())
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"suite": "pairs"}',
        *(
            json.dumps(report(**changes))
            for changes in (
                {"step": 67},
                {"suite": "other"},
                {"suite": ["pairs"]},
                {"name": ""},
                {"read": 19},
                {"read": True},
                {"figures": {"accuracy": 74.1}},
                {"figures": {"accuracy": float("nan")}},
                {"figures": {"accuracy": "0.7"}},
                {"figures": []},
                {"subsets": {"a": 0.5}},
                {"subsets": {"a": {"accuracy": 2}}},
                {"subsets": {"a": {"interval": [0.1]}}},
                {"dropped": {"overlong": -2}},
            )
        ),
    ],
)
def test_a_broken_report_is_left_out_and_said(tmp_path, text):
    folder = evaluations_of(tmp_path, 68)
    write_evaluation(folder, report(), SCORES)
    (folder / "other.json").write_text(text)
    found, said = read(tmp_path)
    assert [evaluation["name"] for evaluation in found] == ["eval"]
    assert len(said) == 1 and said[0].startswith(f"warning: {folder / 'other.json'}: ") and "\n" not in said[0]


def test_broken_scores_are_as_a_broken_report(tmp_path):
    folder = evaluations_of(tmp_path, 68)
    write_evaluation(folder, report(), [{"chosen": 1.0}])
    found, said = read(tmp_path)
    assert found == [] and len(said) == 1
