"""From a loaded run to one HTML page and its figures."""

import base64
import json
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from easyrm.files import flatten
from easyrm.reporting import words
from easyrm.reporting.cards import figure_cards, figures_of, headline_cards
from easyrm.reporting.drawing import Picture
from easyrm.reporting.evaluation_figures import calibration_figure, length_figure, rewards_figure, subsets_figure
from easyrm.reporting.figures import speed_figures, training_figures
from easyrm.reporting.load import Evaluation, Run, Subset, count_of, number, subsets_of
from easyrm.reporting.statistics import calibrate, length_bias
from easyrm.reporting.template import PAGE, STYLE

_MOST_BARS = 40
_FILES = 5  # named one by one


def make_page(run: Run) -> tuple[str, list[Picture]]:
    """The HTML, which holds every figure, and the figures."""
    pictures: list[Picture] = []

    def panel(shown: Picture | str, *texts: str) -> dict[str, Any]:
        if isinstance(shown, str):
            return {"image": "", "alt": "", "texts": [shown, *texts]}
        pictures.append(shown)
        return {"image": base64.b64encode(shown.png).decode(), "alt": shown.alt, "texts": texts}

    record = run.record
    versions = record.get("versions", {})
    html = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    page = html.render(
        style=Markup(STYLE),
        title=run.directory.name,
        about=_about(record),
        headline=headline_cards(run),
        data=_data(run),
        notes=run.notes,
        training=[panel(shown) for shown in training_figures(run)],
        speed=[panel(shown) for shown in speed_figures(run)],
        evaluations=[_evaluation(evaluation, panel) for evaluation in run.evaluations],
        tables=[
            {"title": "Every setting", "rows": _settings("flag", flatten(record["config"]), "--")},
            {"title": "Model", "rows": _settings("field", record["model"])},
            {"title": "Library versions", "rows": _settings("library", versions)},
        ],
    )
    return page, pictures


def _about(record: dict[str, Any]) -> str:
    config = record["config"]
    model = config.get("model", {})
    parts = [
        f"Reward model from {model.get('init_from') or model.get('config') or 'an unnamed model'}",
        f"trained on {config.get('data', {}).get('train') or 'unnamed data'}",
        *([f"recipe {config['recipe']}"] if config.get("recipe") else []),
        *([f"{record['devices']}, {config.get('dtype', '')}"] if record.get("devices") else []),
        *([f"easyrm {record['versions']['easyrm']}"] if record.get("versions", {}).get("easyrm") else []),
    ]
    return " · ".join(parts)


def _data(run: Run) -> dict[str, Any]:
    body = []
    for name, title in (("train", "Training"), ("eval", "Held-out, during training")):
        report = run.record["data"].get(name)
        if report:
            files = [str(file) for file in report.get("files", [])]
            more = [f"and {len(files) - _FILES:,} more"] if len(files) > _FILES else []
            body.append([title, ", ".join(files[:_FILES] + more), *_counts(report, "kept")])
        else:
            body.append([title, "none given", *[words.MISSING] * 3])
    for one in run.evaluations:
        source = str(one.summary.get("source", words.MISSING))
        body.append([f"{one.title}, step {one.step:,}", source, *_counts(one.summary, "scored")])
    return {"head": ["", "files", "read", "used", "dropped"], "numbers": (2, 3), "body": body}


def _counts(report: dict[str, Any], used: str) -> list[str]:
    dropped = report.get("dropped")
    reasons = [f"{words.count(n)} {reason}" for reason, n in dropped.items()] if isinstance(dropped, dict) else None
    lost = words.MISSING if reasons is None else ", ".join(reasons) or "none"
    return [words.count(report.get("read")), words.count(report.get(used)), lost]


def _evaluation(evaluation: Evaluation, panel) -> dict[str, Any]:
    summary = evaluation.summary
    subsets, odd = subsets_of(evaluation)
    about = [
        f"step {evaluation.step:,}",
        *(str(summary[key]) for key in ("source", "dtype", "evaluator") if key in summary),
    ]
    return {
        "title": evaluation.title,
        "about": " · ".join(about),
        "cards": figure_cards(evaluation),
        "panels": [*_score_panels(evaluation, panel), _subset_panel(evaluation, subsets, odd, panel)],
        "subsets": _subset_table(subsets),
    }


def _score_panels(evaluation: Evaluation, panel) -> list[dict[str, Any]]:
    scores = evaluation.scores
    if scores is None:
        return [
            panel(f"{evaluation.name}.scores.jsonl has no scores: rewards, calibration and length bias are not shown.")
        ]
    found = [panel(rewards_figure(evaluation, scores), words.rewards_text(scores))]
    if not scores.paired:
        return [
            *found,
            panel("Several answers are compared at a time, not pairs: calibration and length bias are not shown."),
        ]
    calibration = calibrate(scores.chosen - scores.rejected)
    bias = length_bias(scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens)
    accuracy = float(np.mean(scores.chosen > scores.rejected))
    found.append(panel(calibration_figure(evaluation, calibration), *words.calibration_texts(calibration)))
    return [*found, panel(length_figure(evaluation, bias, accuracy), *words.length_texts(bias))]


def _subset_panel(evaluation: Evaluation, subsets: list[Subset], odd: int, panel) -> dict[str, Any]:
    texts = [f"{count_of(odd, 'subset')} left out: without a count and an accuracy."] if odd else []
    if not subsets:
        return panel(f"No accuracy by subset is recorded in {evaluation.name}.json (step {evaluation.step:,}).", *texts)
    if len(subsets) > _MOST_BARS:
        largest = set(sorted(subsets, key=lambda one: -one.count)[:_MOST_BARS])
        texts.append(f"The {_MOST_BARS} largest of {len(subsets):,} subsets are drawn; the table has all.")
        subsets = [one for one in subsets if one in largest]
    return panel(subsets_figure(evaluation, subsets, number(figures_of(evaluation).get("accuracy"))), *texts)


def _subset_table(subsets: list[Subset]) -> dict[str, Any]:
    body = [
        [
            one.name,
            f"{one.count:,}",
            words.percent(one.accuracy),
            words.interval(*one.interval) if one.interval else words.MISSING,
        ]
        for one in subsets
    ]
    return {"head": ["subset", "pairs", "accuracy", "95 % interval"], "numbers": (1, 2, 3), "body": body}


def _settings(name: str, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    body = [[prefix + key, value if isinstance(value, str) else json.dumps(value)] for key, value in values.items()]
    return {"head": [name, "value"], "numbers": (), "body": body}
