"""Which checkpoints of a run stay."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

LEASE_SECONDS = 6 * 3600  # a reader that was killed holds its step no longer


class Retention:
    """An Orbax preservation policy: the newest `newest`, the `best` by a metric, every `every`-th step, those in use.

    Of a loss the lowest is best, of anything else the highest; of equals the first. A step is in use while a reader's
    lease on it lies in `readers_of(directory)`.
    """

    def __init__(self, newest: int, *, best: int = 0, metric: str = "eval/accuracy", every: int = 0):
        self._newest, self._best, self._metric, self._every = newest, best, metric, every
        self._directory: epath.Path | None = None
        self._metrics: Callable[[int], dict[str, float]] = lambda step: {}

    def follow(self, directory: epath.Path, metrics: Callable[[int], dict[str, float]]) -> None:
        """Judge the steps of `directory` by what `metrics` gives for each."""
        self._directory, self._metrics = directory, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, in order of steps, whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self._newest :]) | {step for step in steps if self._every and step % self._every == 0}
        sign = -1 if self._metric.endswith("loss") else 1
        scored = [step for step in steps if math.isfinite(self._metrics(step).get(self._metric, math.nan))]
        by_score = sorted(scored, key=lambda step: (-sign * self._metrics(step)[self._metric], step))
        kept |= set(by_score[: self._best]) | self._in_use()
        return [step in kept for step in steps]

    def _in_use(self) -> set[int]:
        if self._directory is None or not (folder := readers_of(self._directory)).exists():
            return set()
        found = set()
        for lease in folder.iterdir():
            with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or not a lease
                step = int(lease.name.split("-")[0])
                found |= {step} if lease.stat().mtime > time.time() - LEASE_SECONDS else set()
        return found


def readers_of(directory: epath.Path) -> epath.Path:
    """Where those who read a step of `directory` leave a note named STEP-ANYTHING, for as long as they read."""
    return directory.parent / "readers"
