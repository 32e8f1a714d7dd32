"""The figures that stand on their own: of the run, and of each evaluation."""

import numpy as np

from easyrm.evaluation_files import SHARES, TITLES
from easyrm.reporting import words
from easyrm.reporting.load import Evaluation, Run, held_out, number


def _card(title: str, value: str, about: str = "") -> dict[str, str]:
    return {"title": title, "value": value, "about": about}


def headline_cards(run: Run) -> list[dict[str, str]]:
    """How far the run came, and how well it does."""
    steps = [line["step"] for line in run.lines if "loss" in line or "skipped" in line]
    last, total = max(steps, default=0), run.record.get("total_steps")
    batch = number(run.record["config"].get("data", {}).get("batch_size"))
    cards = [_card("Steps", f"{last:,}", f"of {total:,}" if isinstance(total, int) else "")]
    if batch:
        cards.append(_card("Pairs seen", f"{last * batch:,.0f}", f"{batch:,.0f} a step, repeats counted"))
    for key, title, form in (
        ("loss", "Training loss", lambda value: f"{value:.3f}"),
        ("accuracy", "Training accuracy", words.percent),
    ):
        at, values = run.series(key)
        recent = values[-max(1, len(values) // 20) :]
        mean = f"; mean of the last {len(recent)} logged: {form(recent.mean())}" if len(recent) > 1 else ""
        known = len(values) > 0
        value, about = (form(values[-1]), f"step {at[-1]:,.0f}{mean}") if known else (words.MISSING, "not recorded")
        cards.append(_card(title, value, about))
    cards += _held_out_cards(run)
    for evaluation in run.evaluations:
        suite = str(evaluation.summary.get("suite"))
        if suite in TITLES:
            figures = figures_of(evaluation)
            score = words.percent(figures["score"]) if "score" in figures else words.MISSING
            sections = [key for key in SHARES[suite] if key in figures and key not in ("score", "accuracy")]
            parts = [f"{words.name(key)} {words.percent(figures[key])}" for key in sections]
            cards.append(_card(evaluation.title, score, ", ".join([f"step {evaluation.step:,}", *parts])))
    for key, title, form in (
        ("pairs_per_second", "Pairs a second", words.rate),
        ("mfu", "MFU", words.percent),
    ):
        values = run.series(key)[1]
        if len(values):
            cards.append(_card(title, form(float(np.median(values))), "median of logged steps"))
    return cards


def _held_out_cards(run: Run) -> list[dict[str, str]]:
    held = held_out(run)
    if not held:
        return [_card("Held-out accuracy", words.MISSING, "no evaluation during training was recorded")]
    best = max(held, key=lambda one: one.share)
    cards = []
    for title, one in (("Held-out accuracy, last", held[-1]), ("Held-out accuracy, best", best)):
        known = f"; 95 % interval {words.interval(*one.interval)}, {one.pairs:,} pairs" if one.interval else ""
        which = f"highest of {len(held)}, " if title.endswith("best") else ""
        cards.append(_card(title, words.percent(one.share), f"{which}step {one.step:,}{known}"))
    return cards


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """The headline figures of an evaluation that are numbers, by name."""
    figures = evaluation.summary.get("figures")
    figures = figures if isinstance(figures, dict) else {}
    return {name: value for name, given in figures.items() if (value := number(given)) is not None}


def figure_cards(evaluation: Evaluation) -> list[dict[str, str]]:
    """Every headline figure of an evaluation."""
    figures, shares = figures_of(evaluation), SHARES.get(str(evaluation.summary.get("suite")), SHARES["pairs"])
    ends = [figures.pop(name, None) for name in ("interval_low", "interval_high")]
    about = "" if None in ends else f"95 % interval {words.interval(*ends)}"
    return [
        _card(words.name(name), words.figure(name, value, share=name in shares), about if name == "accuracy" else "")
        for name, value in figures.items()
    ]
