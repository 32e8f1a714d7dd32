"""The section of a model card that shows what was measured, suite by suite."""

from typing import Any

from easyrm.evaluation_files import SHARES, TITLES, title_of
from easyrm.hf.markdown import code, folded, table, text

_SECTIONS = ("score", "chat", "chat_hard", "safety", "reasoning")  # of RewardBench, as its models' cards print them
_NONE = "–"  # noqa: RUF001


def figure_title(figure: str) -> str:
    """The name under which a figure is published: chat_hard becomes Chat Hard."""
    return "Precise IF" if figure == "precise_if" else figure.replace("_", " ").title()


def in_order(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """RewardBench first, files of pairs last."""
    order = [*TITLES, "pairs"]
    return sorted(evaluations, key=lambda evaluation: order.index(evaluation["suite"]))


def results(evaluations: list[dict[str, Any]], name: str, step: int) -> str:
    """All evaluations; RewardBench, in the table of the published cards, even where it was not measured."""
    parts = []
    if not any(evaluation["suite"] == "rewardbench" for evaluation in evaluations):
        parts.append(f"### RewardBench\n\n{_published_table(_SECTIONS, {}, name)}\n\nNot measured at step {step}.")
    return "\n\n".join([*parts, *(_evaluation(evaluation, name) for evaluation in evaluations)])


def _evaluation(evaluation: dict[str, Any], name: str) -> str:
    suite, figures = evaluation["suite"], evaluation["figures"]
    columns = _SECTIONS if suite == "rewardbench" else SHARES[suite]
    shown = _pairs_table(figures) if suite == "pairs" else _published_table(columns, figures, name)
    parts = [f"### {text(title_of(suite, evaluation['name']))}", shown]
    parts.append("\n".join(f"- {line}" for line in _remarks(evaluation)))
    if evaluation["subsets"]:
        parts.append(folded(f"{len(evaluation['subsets'])} subsets", _subsets_table(evaluation["subsets"])))
    return "\n\n".join(parts)


def _published_table(columns: tuple[str, ...], figures: dict[str, float], name: str) -> str:
    """One row, in per cent."""
    head = ["Model", *map(figure_title, columns)]
    return table(head, [[name, *(_percent(figures.get(column)) for column in columns)]])


def _pairs_table(figures: dict[str, float]) -> str:
    interval = [figures.get("interval_low"), figures.get("interval_high")]
    shown = [_percent(figures.get("accuracy")), _interval(interval), figures.get("pairs"), figures.get("ties")]
    head = ["Accuracy, %", "95 % interval", "Pairs", "Ties", "Mean reward difference"]
    return table(head, [[*map(_plain, shown), _difference(figures.get("margin"))]])


def _subsets_table(subsets: dict[str, dict[str, Any]]) -> str:
    """One row a subset; a column that no subset has is left out."""
    columns = {
        "count": ("Records", _plain),
        "correct": ("Correct", _plain),
        "accuracy": ("Accuracy, %", _percent),
        "interval": ("95 % interval", _interval),
        "ties": ("Ties", _plain),
        "margin": ("Mean reward difference", _difference),
    }
    columns = {key: column for key, column in columns.items() if any(key in subset for subset in subsets.values())}
    rows = [[name, *(show(subset.get(key)) for key, (_, show) in columns.items())] for name, subset in subsets.items()]
    return table(["Subset", *(title for title, _ in columns.values())], rows)


def _remarks(evaluation: dict[str, Any]) -> list[str]:
    """How the figures were made, and what they do not count."""
    suite, figures, dropped = evaluation["suite"], evaluation["figures"], evaluation["dropped"]
    lines = []
    if suite == "rewardbench":
        lines.append(
            "In per cent. Score is the mean of the four sections; it is not the total of the old leaderboard, which "
            "weighed prior test sets too. A section is the accuracy of its subsets, weighted by their published counts."
        )
        if "accuracy" in figures:
            lines.append(f"Accuracy over all pairs alike: {_percent(figures['accuracy'])} %.")
    elif suite != "pairs":
        lines.append("In per cent.")
    if suite in ("pairs", "rewardbench"):
        lines.append(f"A tie counts as wrong; ties: {_plain(figures.get('ties'))}.")
    away = ", ".join(f"{count} {text(reason)}" for reason, count in dropped.items() if count) or "none"
    lines.append(
        f"{evaluation['scored']} of {evaluation['read']} records of {code(evaluation['source'])} scored; "
        f"dropped: {away}."
    )
    lines.append(
        f"Evaluator: {text(evaluation['evaluator'])}; compute in {text(evaluation['dtype'])}; at most "
        f"{evaluation['max_length']} tokens a conversation; fingerprint {code(evaluation.get('fingerprint', _NONE))}."
    )
    if length := evaluation.get("length"):
        lines.append(
            f"Length: of {length['pairs']} pairs with one longer response, the longer one got the higher reward in "
            f"{_percent(length['favoured'])} %, and was the chosen one in {_percent(length['chosen'])} %."
        )
    return lines


def _plain(value: Any) -> str:
    return _NONE if value is None else str(value)


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f}"


def _interval(ends: list[float | None] | None) -> str:
    return _NONE if not ends or None in ends else f"{_percent(ends[0])} to {_percent(ends[1])}"


def _difference(value: float | None) -> str:
    return _NONE if value is None else f"{value:+.3f}"
