"""easyrm.evaluate and --eval.suites: figures equal a plain count, of exports, checkpoints and running runs."""

import gzip
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import call, lines_of, make_pairs, make_world, run, run_config, write_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from easyrm.errors import InputError, Resumable
from easyrm.evaluator import Evaluator
from easyrm.train_rm import train
from easyrm.training.progress import START, Progress

SUBSETS = ("easy", "hard", "hard")


def held_out(folder: Path, n: int = 30) -> Path:
    """Pairs in subsets; the last repeats the first, and one is the same on both sides."""
    pairs = make_pairs(n, seed=11, subset=lambda i: SUBSETS[i % 3])
    pairs[5]["rejected"] = pairs[5]["chosen"]
    return write_lines(folder / "held.jsonl", [*pairs, pairs[0]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    settings = make_world(folder)
    path = held_out(folder)
    run(
        {
            **settings,
            "data.eval": str(path),
            "eval.suites": str(path),
            "eval_freq": 2,
            "total_steps": 4,
            "save_freq": 2,
            "export": True,
            "export_dtype": "fp32",
            "output_dir": str(folder / "run"),
        }
    )
    return folder / "run"


def evaluate(model, data, output, **more):
    result = call("evaluate", {"model": model, "data": data, "output": output, "dtype": "fp32", **more})
    assert result.returncode == 0, result.stderr
    reports = {path.stem: json.loads(path.read_text()) for path in Path(output).glob("*.json")}
    scores = {
        name: [json.loads(line) for line in (Path(output) / f"{name}.scores.jsonl").read_text().splitlines()]
        for name in reports
    }
    return reports, scores, result.stdout


def torch_rewards(directory, conversations):
    """The plain loop: one conversation after the other, through transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item())
    return found


def check_against_transformers(export, path, output, **more):
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    reports, scores, _ = evaluate(export, path, output, **more)
    report, lines = reports[path.stem], scores[path.stem]
    assert [line["id"] for line in lines] == [pair["id"] for pair in pairs]
    for side in ("chosen", "rejected"):
        theirs = torch_rewards(export, [pair[side] for pair in pairs])
        np.testing.assert_allclose([line[side] for line in lines], theirs, atol=1e-4)
    right = [line["chosen"] > line["rejected"] for line in lines]
    assert report["figures"]["accuracy"] == pytest.approx(np.mean(right))
    for subset, about in report["subsets"].items():
        mine = [won for won, pair in zip(right, pairs, strict=True) if pair["subset"] == subset]
        assert (about["count"], about["correct"]) == (len(mine), sum(mine))
        low, high = about["interval"]
        assert low < about["accuracy"] < high or about["accuracy"] in (0, 1)
    return report


def test_figures_equal_a_plain_loop_over_the_export(trained, tmp_path):
    path = held_out(tmp_path)
    report = check_against_transformers(trained / "export", path, tmp_path / "out")
    assert set(report["subsets"]) == {"easy", "hard"} and report["figures"]["ties"] == 1
    assert report["figures"]["pairs"] == report["read"] == 31
    assert report["tokens_unique"] < 0.8 * report["tokens"]


@pytest.mark.parametrize("name", ["eval_llmbar", "eval_xstest"])
def test_real_pairs_equal_a_plain_loop_over_the_export(tmp_path, shared, name):
    with gzip.open(shared / "data" / f"{name}.jsonl.gz", "rt") as file:
        lines = file.read().splitlines()[::12]
    path = write_lines(tmp_path / f"{name}.jsonl", lines)
    settings = make_world(tmp_path, pairs=8)
    init = {"model.init_from": str(shared / "checkpoints" / "stories260K"), "tokenizer": "", "model.config": ""}
    output = tmp_path / "run"
    run({**settings, **init, "output_dir": str(output), "total_steps": 1, "export": True, "export_dtype": "fp32"})
    report = check_against_transformers(output / "export", path, tmp_path / "out", max_length=4096)
    assert report["figures"]["pairs"] == len(lines) and len(report["subsets"]) > 1


def test_a_checkpoint_gives_what_its_export_gives(trained, tmp_path):
    path = held_out(tmp_path)
    of_export, scores, _ = evaluate(trained / "export", path, tmp_path / "a")
    of_run, same, said = evaluate(trained, f"{path},{path}", tmp_path / "b", mesh_dim="1,1,1")
    assert scores["held"] == same["held"] == same["held-2"] and of_run["held"]["step"] == 4
    assert of_run["held"]["figures"] == of_export["held"]["figures"]
    assert re.search(r"accuracy +\d+\.\d%", said) and "hard" in said
    earlier, other, _ = evaluate(trained / "checkpoints" / "2", path, tmp_path / "c")
    assert other["held"] != same["held"] and earlier["held"]["step"] == 2


def test_a_run_keeps_its_own_evaluations(trained, tmp_path):
    """What training wrote is what the command finds afterwards, for --data.eval and for a suite alike."""
    path = held_out(tmp_path)
    _, afterwards, _ = evaluate(trained, path, tmp_path / "a")
    for step in (2, 4):
        folder = trained / "evaluations" / str(step)
        assert sorted(file.name for file in folder.iterdir()) == sorted(
            f"{name}{end}" for name in ("eval", "held") for end in (".json", ".scores.jsonl")
        )
    suite = [json.loads(line) for line in (folder / "held.scores.jsonl").read_text().splitlines()]
    for ours, later in zip(suite, afterwards["held"], strict=True):
        assert ours["id"] == later["id"] and ours["chosen"] == pytest.approx(later["chosen"], abs=1e-5)
    own = [json.loads(line) for line in (folder / "eval.scores.jsonl").read_text().splitlines()]
    kept = [line for line in suite if line["chosen"] != line["rejected"]]  # training drops a pair that is no pair
    for ours, other in zip(own, kept, strict=True):
        assert ours["chosen"] == pytest.approx(other["chosen"], abs=1e-5)
        assert ours["chosen_tokens"] == other["chosen_tokens"] and ours["rejected_tokens"] == other["rejected_tokens"]
    line = [line for line in lines_of(trained) if "eval/held/accuracy" in line][-1]
    assert line["eval/held/ties"] == 1 and line["eval/accuracy"] == pytest.approx(31 / 30 * line["eval/held/accuracy"])
    card = (trained / "export" / "README.md").read_text()
    assert "model-index" in card and f"{100 * line['eval/held/accuracy']:.1f}" in card


def test_evaluation_changes_nothing_of_training_and_is_compiled_once(tmp_path, monkeypatch):
    settings = {**make_world(tmp_path), "total_steps": 5, "save_freq": 5}
    plain = run({**settings, "output_dir": str(tmp_path / "plain")})
    sizes = []
    import easyrm.evaluator as module

    def spy(suite, scorer, *rest):
        found = judge(suite, scorer, *rest)
        sizes.append(scorer.rewards_of.func.__self__._rewards._cache_size())
        return found

    judge = module.judge
    monkeypatch.setattr(module, "judge", spy)
    watched = {**settings, "eval.suites": str(held_out(tmp_path)), "eval_freq": 1, "output_dir": str(tmp_path / "eval")}
    lines = [line for line in run(watched) if "loss" in line]
    for before, now in zip(plain, lines, strict=True):
        for key in ("loss", "grad_norm", "param_norm", "learning_rate", "accuracy"):
            assert before[key] == now[key]
    assert sizes == [1] * 5


def test_patience_ends_a_run_and_a_restart_leaves_it_ended(tmp_path, capsys):
    settings = {
        **make_world(tmp_path),
        "data.eval": str(held_out(tmp_path)),
        "eval_freq": 1,
        "best_metric": "eval/loss",
        "keep_best": 1,
        "optimizer.lr": 3.0,  # far too high: the first evaluations are the best
        "optimizer.warmup_ratio": 0.0,
        "num_epochs": 5.0,
        "eval.patience": 3,
        "output_dir": str(tmp_path / "run"),
    }
    lines = run(settings)
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    best = int(np.argmin(losses))
    assert len(losses) == best + 4 < 60
    said = capsys.readouterr().out
    assert "the run ends early" in said and f"of step {best + 1}" in said
    assert (tmp_path / "run" / "checkpoints" / str(best + 1)).is_dir()
    assert run(settings) == lines
    assert "the run ends early" in capsys.readouterr().out
    longer = run({**settings, "eval.patience": 4})
    assert len([line for line in longer if "eval/loss" in line]) >= best + 5


def test_the_best_of_another_figure_does_not_count():
    progress = Progress()
    for step, accuracy in enumerate([0.9, 0.8, 0.7], 1):
        progress = progress.after(step, 4).evaluated(
            {"eval/accuracy": accuracy, "eval/loss": 1 / step}, "eval/accuracy"
        )
    assert progress.told_by("eval/accuracy") == progress and progress.stale == 2
    other = progress.told_by("eval/loss")
    assert (other.best, other.best_step, other.stale, other.step) == (None, 0, 0, 3)
    other = other.after(4, 4).evaluated({"eval/accuracy": 0.6, "eval/loss": 5.0}, "eval/loss")
    assert (other.best, other.best_step, other.stale) == (5.0, 4, 0)
    before = Progress(best=0.9, best_step=1, stale=2)  # of a version that did not note the name
    assert before.told_by("eval/loss") == before


def test_best_and_stale_steps():
    progress, seen = START, []
    for step, value in enumerate([0.5, 0.7, 0.7, float("nan"), 0.8, 0.1], 1):
        progress = progress.after(step, 4).evaluated({"eval/accuracy": value}, "eval/accuracy")
        seen.append((progress.best, progress.best_step, progress.stale))
    assert seen == [(0.5, 1, 0), (0.7, 2, 0), (0.7, 2, 1), (0.7, 2, 2), (0.8, 5, 0), (0.8, 5, 1)]
    assert progress.position == 24


def test_refusals(trained, tmp_path):
    def refused(match, **settings):
        result = call("evaluate", {"model": trained, "data": held_out(tmp_path), "dtype": "fp32", **settings})
        assert result.returncode == 2 and match in result.stderr and result.stderr.count("\n") == 1, result.stderr

    refused("rewardbnch: neither a suite (pairs, rewardbench", data="rewardbnch")
    refused("no file is named", data="pairs:")
    refused("both needed", data="")
    rows = write_lines(tmp_path / "rb.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "subset": "x", "id": 1}])
    refused("rewardbench:", data=rows)
    refused("nothing to evaluate among 1 records", data=write_lines(tmp_path / "bad.jsonl", ["{torn"]))
    settings = {**make_world(tmp_path), "output_dir": str(tmp_path / "run")}
    for more, match in (
        ({"eval.patience": 2}, "--eval.patience=2 needs pairs"),
        ({"eval.patience": 2, "data.eval": "x", "eval_freq": 0}, "--eval_freq=0: nothing is evaluated before"),
        ({"eval.patience": -1, "data.eval": "x"}, "--eval.patience=-1"),
        ({"eval.suites": str(rows)}, "write rewardbench:"),
        (
            {"keep_best": 1, "eval.suites": str(held_out(tmp_path)), "best_metric": "eval/held/score"},
            "choose one of eval/held/accuracy$",
        ),
    ):
        with pytest.raises(InputError, match=match):
            train(run_config({**settings, **more}))


def test_an_evaluation_that_cannot_be_kept_or_decide_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    """A bucket's client has errors of its own; and a suite may lack what its figure is made of."""

    class HttpError(Exception):
        pass

    def fails(*_):
        raise HttpError("503")

    rows = [
        {"prompt": f"why {i}", "chosen": "ant", "rejected": "bee", "subset": "xstest-should-refuse"} for i in range(3)
    ]
    suite = write_lines(tmp_path / "rb.jsonl", rows)
    settings = {**make_world(tmp_path), "eval_freq": 1, "total_steps": 2, "output_dir": str(tmp_path / "run")}
    settings |= {"eval.suites": f"rewardbench:{suite}", "keep_best": 1, "best_metric": "eval/rewardbench/score"}
    monkeypatch.setattr("easyrm.evaluator.write_evaluation", fails)
    assert [line["step"] for line in run(settings) if "loss" in line] == [1, 2]
    said = capsys.readouterr().out
    assert "warning: the evaluations of step 1 are not written (503); their figures are logged" in said
    assert "warning: no eval/rewardbench/score at step 1" in said


def test_a_pending_evaluation_for_which_there_are_no_pairs_any_more(tmp_path, monkeypatch):
    settings = {**make_world(tmp_path), "data.eval": str(held_out(tmp_path)), "output_dir": str(tmp_path / "run")}
    settings |= {"eval_freq": 2, "total_steps": 4, "save_freq": 1}
    whole = Evaluator.__call__

    def cut_short(self, rewards_of, step, stop):
        signal.raise_signal(signal.SIGTERM)
        return whole(self, rewards_of, step, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", cut_short)
        with pytest.raises(Resumable):
            run(settings)
    lines = run({**settings, "data.eval": ""})
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("loss" in line for line in lines)


def test_what_evaluate_writes_is_not_taken_for_the_run_s_own(trained, tmp_path):
    """eval is the name of --data.eval."""
    own = (trained / "evaluations" / "4" / "eval.json").read_bytes()
    path = held_out(tmp_path).rename(tmp_path / "eval.jsonl")
    result = call("evaluate", {"model": trained, "data": path, "dtype": "fp32"})
    assert result.returncode == 0, result.stderr
    assert (trained / "evaluations" / "4" / "eval.json").read_bytes() == own and "eval-2: " in result.stdout
    (tmp_path / "file").write_text("")
    for command, flags in (("evaluate", {"model": trained, "data": path}), ("convert", {"checkpoint": trained})):
        result = call(command, {**flags, "output": tmp_path / "file" / "out"})
        assert result.returncode == 2 and "cannot be written (" in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
