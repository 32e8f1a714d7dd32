"""The report: its arithmetic against other ways to count, and the page against files that lack or hold anything."""

import json
import math
import re
import sys

import numpy as np
import pytest
from etils import epath
from runs import call, write_lines
from scipy import stats

from easyrm.config import RunConfig
from easyrm.errors import InputError
from easyrm.files import sha256_of
from easyrm.reporting.drawing import shorten
from easyrm.reporting.load import held_out, load_run
from easyrm.reporting.page import make_page
from easyrm.reporting.statistics import calibrate, length_bias, running_mean
from easyrm.reporting.words import calibration_texts, length_texts

HOSTILE = '<img src="https://evil.example/x"> $\\frac{ & \n\u4f60'


def make_pairs(n, seed=0, slope=0.0, scale=1.0):
    """chosen, rejected, chosen_tokens, rejected_tokens; the reward difference gains `slope` for each token more."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 400, (2, n)).astype(float)
    difference = rng.normal(1, 1.5, n) * scale + slope * (tokens[0] - tokens[1])
    base = rng.normal(size=n)
    return base + difference / 2, base - difference / 2, *tokens


def make_run(folder, lines=(), **record):
    config = RunConfig()
    config.data.train, config.model.init_from, config.output_dir = "pairs.jsonl", "some/model", str(folder)
    counts = {"files": ["pairs.jsonl"], "read": 1234, "kept": 1230, "dropped": {"overlong": 4}}
    record = {
        "config": config.to_dict(),
        "model": {"hidden_size": 32},
        "data": {"train": counts, "eval": None},
        "total_steps": 300,
        "versions": {"easyrm": "0.1.0", "jax": "0.10.2"},
        **record,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**record, "sha256": sha256_of(record)}))
    write_lines(folder / "metrics.jsonl", list(lines))
    return epath.Path(folder)


def add_evaluation(run, step, name, pairs, *odd, **summary):
    folder = run / "evaluations" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    lines = [dict(zip(names, values, strict=True)) for values in zip(*map(list, pairs), strict=True)]
    write_lines(folder / f"{name}.scores.jsonl", [*lines, *odd])
    summary = {"suite": "pairs", "source": "heldout.jsonl", "read": 9, "scored": 9, "dropped": {}, **summary}
    (folder / f"{name}.json").write_text(json.dumps(summary))


def training_line(step, **more):
    return {"step": step, "loss": 0.7, "accuracy": 0.5, "learning_rate": 1e-5, "grad_norm": 2.0, **more}


def page_of(run):
    """The page's HTML without its pictures, their names, and the run's notes as one text."""
    loaded = load_run(run)
    html, pictures = make_page(loaded)
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)
    assert html.count("data:image/png;base64,") == len(pictures)
    html = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    return html, {picture.name for picture in pictures}, " ".join(loaded.notes)


def test_calibration_is_that_of_a_plain_count():
    chosen, rejected, *_ = make_pairs(1007)
    difference = chosen - rejected
    difference[:9] = 0
    found = calibrate(difference)
    sure = sorted(((1 / (1 + math.exp(-abs(d)))), 0.5 if d == 0 else float(d > 0)) for d in difference)
    assert [one.count for one in found.bins] == [101] * 7 + [100] * 3
    error, start = 0.0, 0
    for one in found.bins:
        part = sure[start : start + one.count]
        start += one.count
        mean, share = (sum(pair[i] for pair in part) / len(part) for i in (0, 1))
        assert (one.mean, one.share) == pytest.approx((mean, share))
        assert one.low < share < one.high
        error += abs(mean - share) * len(part) / len(sure)
    assert found.error == pytest.approx(error)
    assert found.observed == pytest.approx(sum(hit for _, hit in sure) / len(sure))


def test_calibration_does_not_depend_on_which_side_is_favoured_and_ties_are_calibrated():
    tied = calibrate(np.zeros(60))
    assert (tied.error, tied.predicted, tied.observed) == (0, 0.5, 0.5)
    difference = np.random.default_rng(1).normal(size=400)
    right, wrong = calibrate(difference), calibrate(-difference)
    assert right.predicted == pytest.approx(wrong.predicted)
    assert right.observed + wrong.observed == pytest.approx(1)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "consistent"), (3.0, "overconfident"), (0.3, "underconfident")])
def test_labels_drawn_by_bradley_terry_are_called_calibrated(scale, verdict):
    rng = np.random.default_rng(2)
    size = np.abs(rng.normal(0, 1.5, 20_000))
    difference = np.where(rng.random(size.size) < 1 / (1 + np.exp(-size)), size, -size)
    found = calibrate(scale * difference)
    assert verdict in calibration_texts(found)[0]
    assert (found.error < 0.015) == (scale == 1)


def test_length_bias_is_that_of_a_plain_count():
    chosen, rejected, long, short = make_pairs(900, slope=0.004)
    short[:40] = long[:40]
    chosen[40:47] = rejected[40:47]
    found = length_bias(chosen, rejected, long, short)
    credit, labels, count = 0.0, 0, 0
    for c, r, a, b in zip(chosen, rejected, long, short, strict=True):
        if a != b:
            credit += 0.5 if c == r else (c > r) == (a > b)
            labels += a > b
            count += 1
    assert found.unequal == count <= 860
    assert found.favoured[0] == pytest.approx(credit / count) and found.chosen[0] == pytest.approx(labels / count)
    assert found.excess[0] == pytest.approx((credit - labels) / count)
    for one in found.bins:
        inside = [
            c > r for c, r, n in zip(chosen, rejected, long - short, strict=True) if one.least <= n <= one.largest
        ]
        assert (one.count, one.share) == (len(inside), pytest.approx(np.mean(inside)))
    assert sum(one.count for one in found.bins) == 900
    rewards, lengths = np.concatenate([chosen, rejected]), np.concatenate([long, short])
    ranks = [stats.rankdata(values) for values in (rewards, lengths)]
    assert found.pearson == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.difference_pearson == pytest.approx(np.corrcoef(chosen - rejected, long - short)[0, 1])


@pytest.mark.parametrize(("slope", "says"), [(0.02, "more often"), (0.0, "no more and no less"), (-0.02, "less often")])
def test_the_sentence_on_length_follows_the_bias(slope, says):
    assert says in length_texts(length_bias(*make_pairs(1500, seed=3, slope=slope)))[0]


def test_length_bias_where_nothing_varies():
    found = length_bias(*np.ones((4, 30)))
    assert (found.favoured, found.chosen, found.excess, found.pearson, found.spearman) == (None,) * 5
    assert [one.count for one in found.bins] == [30]
    assert "undefined" in length_texts(found)[1] and "equal length" in length_texts(found)[0]


@pytest.mark.parametrize("count", [1, 2, 9, 50])
def test_running_mean(count):
    values = np.random.default_rng(4).normal(size=count)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(count)]
    assert running_mean(values, 5) == pytest.approx(np.array(expected))


def test_a_whole_run(tmp_path):
    lines = [training_line(step, pairs_per_second=40.0, tokens_per_second=9e3, mfu=0.4) for step in range(1, 101)]
    lines.insert(60, {"step": 50, "eval/loss": 0.6, "eval/accuracy": 0.81, "eval/pairs": 200})
    lines.append({"step": 100, "eval/loss": 0.6, "eval/accuracy": 0.75, "eval/pairs": 200, "eval/suite/score": 0.6})
    run = make_run(tmp_path / "run", lines)
    subset = {"count": 100, "correct": 90, "ties": 0, "accuracy": 0.9, "interval": [0.826, 0.945], "margin": 1.0}
    figures = {"accuracy": 0.741, "margin": 1.25, "pairs": 300, "interval_low": 0.688, "interval_high": 0.787}
    add_evaluation(run, 50, "eval", make_pairs(50), figures={"accuracy": 0.123})
    add_evaluation(run, 100, "eval", make_pairs(300), figures=figures, subsets={"easy": subset})
    add_evaluation(run, 9, "rb", make_pairs(60), suite="rewardbench", figures={"score": 0.5, "chat_hard": 0.4567})
    html, names, notes = page_of(run)
    of_eval = {f"eval-{name}" for name in ("rewards", "calibration", "length", "subsets")}
    of_run = {"loss", "accuracy", "learning-rate", "gradient-norm", "benchmarks", "mfu"}
    assert names == of_eval | of_run | {f"{x}-per-second" for x in ("pairs", "tokens")} | {
        "rb-rewards",
        "rb-calibration",
        "rb-length",
    }
    assert not notes
    for text in ("1,234", "4 overlong", "74.1 %", "68.8 to 78.7 %", "+1.250", "82.6 to 94.5 %", "Chat hard 45.7 %"):
        assert text in html, text
    assert "12.3 %" not in html  # of an older step
    held = held_out(load_run(run))
    assert [(one.step, one.share) for one in held] == [(50, 0.81), (100, 0.75)]
    interval = stats.binomtest(150, 200).proportion_ci(method="wilson")
    assert held[1].interval == pytest.approx((interval.low, interval.high))
    assert "81.0 %" in html and "75.0 %" in html
    assert "--data.train" in html and "0.10.2" in html and "<details" in html


def test_the_page_loads_nothing_and_escapes_what_comes_from_data(tmp_path):
    run = make_run(tmp_path / "run", [training_line(1)], versions={"<script>alert(1)</script>": "1"})
    entry = {"count": 5, "accuracy": 0.5, "interval": [0.1, 0.9]}
    add_evaluation(run, 1, "eval", make_pairs(30), subsets={HOSTILE: entry}, source=HOSTILE, dropped={HOSTILE: 3})
    html, _, _ = page_of(run)
    assert "&lt;img src=&#34;https://evil.example/x&#34;&gt;" in html and "&lt;script&gt;" in html
    tags = re.findall(r"<[a-zA-Z][^>]*>", html)
    assert not [tag for tag in tags if "://" in tag]
    assert set(re.findall(r"src=\"([^\"]*)", " ".join(tags))) == {""}  # the pictures, which page_of took out
    assert not re.search(r"<(script|link|iframe|object)|@import|url\(", html)


@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_absent_is_said(tmp_path, steps):
    html, names, _ = page_of(make_run(tmp_path / "run", [training_line(step + 1) for step in range(steps)]))
    assert names == ({"loss", "accuracy", "learning-rate", "gradient-norm"} if steps else set())
    for text in ("no evaluations/STEP/NAME.json", "no evaluation during training was recorded", "(MFU): not recorded"):
        assert text in html
    assert ("No loss was recorded." in html) == (not steps)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()


def test_odd_lines_are_counted_and_left_out(tmp_path):
    lines = [
        training_line(1),
        "{broken",
        "[1]",
        '{"loss": 1}',
        '{"step": true, "loss": 0.5}',
        '{"step": 2, "loss": NaN, "accuracy": "high"}',
        '{"step": 3, "loss": 1e999, "grad_norm": null}',
        {"step": 4, "skipped": 1, "pairs": 64},
        {"step": 5, "eval/accuracy": 7},
        f'{{"step": {10**400}, "loss": 1.0}}',
    ]
    run = make_run(tmp_path / "run", lines)
    _, names, notes = page_of(run)
    assert load_run(run).series("loss")[1].tolist() == [0.7] and held_out(load_run(run)) == []
    assert "5 lines of metrics.jsonl left out" in notes
    assert "4 values in metrics.jsonl left out" in notes and "1 step skipped" in notes
    assert "loss" in names


def test_odd_evaluations_are_counted_and_left_out(tmp_path):
    run = make_run(tmp_path / "run", [training_line(1)])
    odd = [
        "{",
        "3",
        '{"chosen": NaN, "rejected": 1, "chosen_tokens": 1, "rejected_tokens": 1}',
        '{"chosen": 1e300, "rejected": 1, "chosen_tokens": 1, "rejected_tokens": 1}',
        '{"chosen": [1, 2], "rejected": 1, "chosen_tokens": 1, "rejected_tokens": 1}',
        '{"chosen": [], "rejected": 1, "chosen_tokens": [], "rejected_tokens": 1}',
        '{"chosen": 1, "rejected": 1}',
    ]
    subsets = {
        "whole": {"count": 5, "accuracy": 0.5},
        "odd": {"count": "x"},
        "odder": [],
        "no share": {"count": 1, "accuracy": 2},
    }
    add_evaluation(run, 7, "eval", make_pairs(30), *odd, subsets=subsets, figures=[], dropped=[1], suite=[2])
    add_evaluation(run, 7, "none", [[], [], [], []], "{")
    add_evaluation(run, 7, "damaged", make_pairs(5))
    (run / "evaluations" / "7" / "damaged.json").write_text("{")
    add_evaluation(run, "latest", "lost", make_pairs(5))
    html, names, notes = page_of(run)
    assert "7 lines of eval.scores.jsonl (step 7) left out" in notes
    assert "damaged.json: not JSON" in notes and "evaluations/latest/lost.json left out" in notes
    assert "3 subsets left out" in html and "none.scores.jsonl has no scores" in html
    assert {"eval-rewards", "eval-subsets"} <= names and not any(name.startswith(("none", "lost")) for name in names)


def test_several_answers_are_not_taken_for_pairs(tmp_path):
    run = make_run(tmp_path / "run", [training_line(1)])
    many = {"chosen": [1.5], "rejected": [0.5, -1, 2], "chosen_tokens": [9], "rejected_tokens": [7, 8, 9]}
    figures = {"score": 0.7, "ties": -0.004, "factuality": 0.6}
    add_evaluation(run, 1, "rb2", [[], [], [], []], many, many, suite="rewardbench2", figures=figures)
    html, names, notes = page_of(run)
    assert "No accuracy by subset is recorded in rb2.json" in html
    scores = load_run(run).evaluations[0].scores
    assert (len(scores.chosen), len(scores.rejected), scores.paired) == (2, 6, False)
    assert "Several answers are compared at a time" in html and not notes
    assert {name for name in names if name.startswith("rb2")} == {"rb2-rewards"}
    assert "RewardBench 2 (rb2), step 1" in html
    assert "step 1, Factuality 60.0 %, Ties \u22120.4 %" in html  # a share in this suite, which goes below 0


def test_many_subsets_are_drawn_in_part_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    subsets = {f"s{i}": {"count": i + 1, "accuracy": 0.5, "interval": [0.4, 0.6]} for i in range(60)}
    add_evaluation(run, 1, "eval", make_pairs(30), subsets=subsets)
    html, _, _ = page_of(run)
    assert "The 40 largest of 60 subsets are drawn" in html and "<td>s0</td>" in html


def test_long_names_stay_short():
    assert shorten("a\nb\x00c") == "a b c" and len(shorten("x" * 500)) <= 28


def test_the_command(tmp_path):
    run = make_run(tmp_path / "run", [training_line(1)])
    done = call("report", {}, str(run), f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"report.html", "loss.png", "accuracy.png", "learning-rate.png", "gradient-norm.png"}
    assert "wrote" in done.stdout and not done.stderr
    done = call("report", {"run": run})
    assert done.returncode == 0 and (run / "report" / "report.html").exists()
    for arguments, says in (
        ([str(tmp_path / "out")], "no such file; name the directory of a run"),
        ([], "no run is named"),
        ([str(run), "more"], "unexpected argument"),
        ([str(run), f"--output={run / 'config.json'}"], "cannot be written"),
    ):
        done = call("report", {}, *arguments)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_changed_record_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, "total_steps": 1}))
    with pytest.raises(InputError, match="changed after the run wrote it"):
        load_run(run)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    run = make_run(tmp_path / "run")
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'matplotlib': raise ModuleNotFoundError(name, name=name)\nsys.meta_path.insert(0, Hide())\n"
    )
    done = call("report", {"run": run}, PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}")
    assert done.returncode == 2 and "pip install easyrm[report]" in done.stderr and done.stderr.count("\n") == 1
