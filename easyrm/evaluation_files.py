"""The files of evaluations: NAME.json, a report, and NAME.scores.jsonl, the rewards of all records that it counts."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from easyrm.errors import InputError
from easyrm.files import write_atomically
from easyrm.strict_json import read_object

# The figures of each suite that are shares in [0, 1], in the order in which they are published.
SHARES = {
    "pairs": ("accuracy", "interval_low", "interval_high"),
    "rewardbench": ("score", "chat", "chat_hard", "safety", "reasoning", "accuracy"),
    "rewardbench2": ("score", "factuality", "precise_if", "math", "safety", "focus", "ties"),
    "rm-bench": ("score", "easy", "normal", "hard", "chat", "math", "code", "safety"),
}
HELD_OUT = "eval"  # the name of --data.eval among the evaluations
PAIRWISE = ("pairs", "rewardbench")  # one chosen and one rejected reward a record
# Of the suites that are published, in the order of a card.
TITLES = {"rewardbench": "RewardBench", "rewardbench2": "RewardBench 2", "rm-bench": "RM-Bench"}


def title_of(suite: Any, name: str) -> str:
    """Of a suite, with the evaluation's own name where it is another, or of pairs (HELD_OUT: those of --data.eval)."""
    if str(suite) in TITLES:
        return TITLES[suite] if name == suite else f"{TITLES[suite]} ({name})"
    return "Held-out pairs" if name == HELD_OUT else f"Pairs: {name}"


def evaluations_of(run_dir: epath.PathLike, step: int) -> epath.Path:
    """Where the evaluations of one step of a run lie."""
    return epath.Path(run_dir) / "evaluations" / str(step)


def write_evaluation(directory: epath.PathLike, report: dict[str, Any], scores: Iterable[dict[str, Any]]) -> None:
    """Write one line for each of `scores`, then `report`; their files are named after `report["name"]`.

    A report never lies beside scores that are not its own: one that is there is removed first. Raises OSError where
    `directory` cannot be written.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report['name']}.json"
    path.unlink(missing_ok=True)
    write_atomically(_scores_of(path), "".join(json.dumps(score) + "\n" for score in scores))
    write_atomically(path, json.dumps(report, indent=2) + "\n")


def read_evaluations(directory: epath.PathLike, step: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The reports of one step of the run in `directory`, by name.

    Each with `length`, what `_length_figures` counts in its scores, or None. A file that is no such report is left
    out, and `say` hears of it: whoever reads these has something to finish that does not depend on them.
    """
    folder, found = evaluations_of(directory, step), []
    try:
        files = sorted(folder.glob("*.json")) if folder.exists() else []
    except Exception as error:  # a bucket's client has errors of its own
        say(f"warning: {folder}: cannot be listed ({error}); its evaluations are left out")
        return []
    for file in files:
        try:
            report = read_object(file)
            _check(report, step)
            scores = _scores_of(file)
            pairwise = report["suite"] in PAIRWISE and scores.exists()
            report["length"] = _length_figures(scores.read_text()) if pairwise else None
        except Exception as error:
            say(f"warning: {file}: not a whole evaluation of step {step} ({error}); it is left out")
        else:
            found.append(report)
    return found


def _scores_of(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name.removesuffix('.json')}.scores.jsonl")


def _length_figures(lines: str) -> dict[str, float]:
    """Of the `pairs` that have one longer side: the shares in which it was `favoured`, and in which it was `chosen`."""
    pairs = favoured = chosen = 0
    for line in filter(None, lines.split("\n")):
        score = json.loads(line)
        longer = score["chosen_tokens"] - score["rejected_tokens"]
        pairs += longer != 0
        favoured += longer * (score["chosen"] - score["rejected"]) > 0
        chosen += longer > 0
    return {"pairs": pairs, "favoured": favoured / max(pairs, 1), "chosen": chosen / max(pairs, 1)}


def _check(report: dict[str, Any], step: int) -> None:
    """Raise InputError unless all that a reader relies on is there, of the right form and consistent."""
    wrong = [name for name, fits in _FORM.items() if not fits(report.get(name))]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: missing, or of another form")
    if report.get("step") not in (None, step):
        raise InputError(f"it is of step {report['step']}")
    if report["read"] != report["scored"] + sum(report["dropped"].values()):
        raise InputError(f"{report['read']} read are not {report['scored']} scored and {report['dropped']} dropped")
    shares = {name: report["figures"].get(name, 0) for name in SHARES[report["suite"]]}
    shares |= {f"accuracy of {name}": subset.get("accuracy") or 0 for name, subset in report["subsets"].items()}
    # RewardBench 2's ties go, as published, a hundredth beyond.
    if outside := {name: share for name, share in shares.items() if not -0.01 <= share <= 1.01}:
        raise InputError(f"{outside}: not shares in [0, 1]")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_figure(value: Any) -> bool:
    """A figure of a subset: a number, none, or the two ends of an interval."""
    return (
        value is None
        or _is_number(value)
        or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
    )


_FORM = {
    "suite": lambda value: isinstance(value, str) and value in SHARES,
    "name": _is_text,
    "source": _is_text,
    "evaluator": _is_text,
    "dtype": _is_text,
    "max_length": _is_count,
    "read": _is_count,
    "scored": _is_count,
    "dropped": _is_dict_of(_is_count),
    "figures": _is_dict_of(_is_number),
    "subsets": _is_dict_of(_is_dict_of(_is_figure)),
}
