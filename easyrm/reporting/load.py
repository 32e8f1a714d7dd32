"""What a run left on disk, as arrays; what cannot be used is counted and said.

P pairs, S scored records, T training lines.
"""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from easyrm.errors import InputError
from easyrm.evaluation_files import title_of
from easyrm.redact import redact_tree
from easyrm.run import read_record
from easyrm.strict_json import read_object
from easyrm.suites.interval import wilson
from easyrm.training.metrics import read_metrics

_SIDES = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
_LARGEST = float(np.finfo(np.float32).max)  # rewards are float32


class HeldOut(NamedTuple):
    """One evaluation during training: accuracy, and its 95 % interval and pairs where the pairs are recorded."""

    step: int
    share: float
    interval: tuple[float, float] | None
    pairs: int | None


class Subset(NamedTuple):
    """One subset of an evaluation; `interval` is None where the file has none."""

    name: str
    count: int
    accuracy: float
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of one evaluation: float64 arrays of every answer, chosen and rejected, and their tokens.

    `paired`: each record has one of either, so that entry i of all four arrays is one pair. `odd`: lines left out.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    paired: bool
    odd: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """evaluations/STEP/NAME.json and its scores, None where NAME.scores.jsonl is absent or has no usable line."""

    name: str
    step: int
    summary: dict[str, Any]
    scores: Scores | None

    @property
    def title(self) -> str:
        """The name of a benchmark, or of a file of pairs."""
        return title_of(self.summary.get("suite"), self.name)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's record, the lines of its metrics.jsonl, each name's newest evaluation, and `notes` on what is odd."""

    directory: epath.Path
    record: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of every line on which `key` is a finite number, float64 each."""
        found = [(line["step"], value) for line in self.lines if (value := number(line.get(key))) is not None]
        steps, values = np.array(sorted(found), np.float64).reshape(-1, 2).T
        return steps, values


def number(value: Any) -> float | None:
    """A finite number as float32 can hold it, else None; true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value)


def load_run(directory: epath.Path) -> Run:
    """Everything that a report is made of. Raises InputError where `directory` is no run, as `run.read_record` does."""
    record = read_record(directory)
    notes: list[str] = []
    lines = [line for line in read_metrics(directory) if number(line["step"]) is not None]
    path = directory / "metrics.jsonl"
    if path.exists():
        texts = path.read_bytes().decode(errors="replace").splitlines(True)
        if broken := len(texts) - len(lines):
            notes.append(f"{count_of(broken, 'line')} of metrics.jsonl left out: not a whole JSON object with a step.")
        if odd := sum(number(value) is None for line in lines for value in line.values()):
            notes.append(f"{count_of(odd, 'value')} in metrics.jsonl left out: not a finite number.")
    else:
        notes.append("There is no metrics.jsonl: nothing is known of the training.")
    if skipped := sum("skipped" in line for line in lines):
        notes.append(f"{count_of(skipped, 'step')} skipped: loss or gradient was not finite (see nonfinite.jsonl).")
    return Run(directory, record, lines, _newest_evaluations(directory, notes), notes)


def held_out(run: Run) -> list[HeldOut]:
    """The held-out accuracies of metrics.jsonl, in order; what is no share in [0, 1] is none."""
    found = []
    for line in run.lines:
        share, pairs = number(line.get("eval/accuracy")), number(line.get("eval/pairs"))
        if share is not None and 0 <= share <= 1:
            count = int(pairs) if pairs is not None and pairs >= 1 else None
            found.append(HeldOut(line["step"], share, wilson(share * count, count) if count else None, count))
    return found


def subsets_of(evaluation: Evaluation) -> tuple[list[Subset], int]:
    """The subsets of an evaluation, lowest accuracy last, and how many entries are none."""
    given = evaluation.summary.get("subsets")
    given = given if isinstance(given, dict) else {}
    found = [subset for name, entry in given.items() if (subset := _subset(name, entry))]
    return sorted(found, key=lambda one: (-one.accuracy, one.name)), len(given) - len(found)


def _subset(name: str, entry: Any) -> Subset | None:
    if not isinstance(entry, dict):
        return None
    count, accuracy = number(entry.get("count")), number(entry.get("accuracy"))
    if count is None or accuracy is None or not 0 <= accuracy <= 1:
        return None
    ends = entry.get("interval")
    ends = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else [None]
    return Subset(name, int(count), accuracy, None if None in ends else (ends[0], ends[1]))


def count_of(count: int, noun: str) -> str:
    """`count` with its noun: 1 line, 2 lines."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _newest_evaluations(directory: epath.Path, notes: list[str]) -> list[Evaluation]:
    newest: dict[str, tuple[int, epath.Path]] = {}
    for file in directory.glob("evaluations/*/*.json"):
        step = int(file.parent.name) if file.parent.name.isdecimal() else -1
        if step < 0:
            notes.append(f"evaluations/{file.parent.name}/{file.name} left out: its folder is not named after a step.")
        elif step >= newest.get(file.stem, (-1, file))[0]:
            newest[file.stem] = step, file
    found = []
    for name, (step, file) in sorted(newest.items(), key=lambda item: (item[0] != "eval", item[0])):
        try:
            summary = redact_tree(read_object(file))
            scores = _read_scores(file.with_name(f"{name}.scores.jsonl"))
        except (InputError, OSError) as error:
            notes.append(f"An evaluation is left out: {error}.")
            continue
        found.append(Evaluation(name, step, summary, scores))
        if scores and scores.odd:
            notes.append(f"{count_of(scores.odd, 'line')} of {name}.scores.jsonl (step {step}) left out: not scores.")
    return found


def _read_scores(file: epath.Path) -> Scores | None:
    if not file.exists():
        return None
    records, odd = [], 0
    for text in file.read_bytes().splitlines():
        values = _sides(text)
        odd += values is None
        records += [values] if values else []
    if not records:
        return None
    chosen, rejected, chosen_tokens, rejected_tokens = (
        np.array([value for record in records for value in record[i]]) for i in range(4)
    )
    paired = all(len(record[0]) == len(record[1]) == 1 for record in records)
    return Scores(chosen, rejected, chosen_tokens, rejected_tokens, paired, odd)


def _sides(text: bytes) -> list[list[float]] | None:
    """The four lists of one line, a scalar as a list of one; None for what is not scores."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    given = [line.get(side) for side in _SIDES]
    found = [[number(x) for x in (values if isinstance(values, list) else [values])] for values in given]
    lengths = [len(values) for values in found]
    whole = all(x is not None and math.isfinite(x) for values in found for x in values) and 0 not in lengths
    return found if whole and lengths[:2] == lengths[2:] else None
