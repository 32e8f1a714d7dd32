"""Where a run stands."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` steps taken, `position` pairs consumed, the evaluation of this step or that it waits.

    `metrics` are the evaluation's figures, empty where there was none; `pending_eval`: it was due and cut short. Of
    the evaluations so far, `best_step` had the `best` figure of the name `best_of`, and `stale` came after it.
    """

    step: int = 0
    position: int = 0
    pending_eval: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    best_of: str = ""

    def after(self, step: int, batch_size: int) -> "Progress":
        """The progress of a run that went on from here to `step`."""
        position = self.position + (step - self.step) * batch_size
        return dataclasses.replace(self, step=step, position=position, pending_eval=False, metrics={})

    def told_by(self, name: str) -> "Progress":
        """The progress of a run whose best step is told by the figure `name` from here on; another's does not count."""
        return self if self.best_of in ("", name) else dataclasses.replace(self, best=None, best_step=0, stale=0)

    def evaluated(self, metrics: dict[str, float], name: str) -> "Progress":
        """The progress with the figures of an evaluation, by one of which, `name`, the best step is told."""
        found = dataclasses.replace(self, pending_eval=False, metrics=metrics, best_of=name)
        value = metrics.get(name, math.nan)
        if self.best is not None and not is_better(name, value, self.best):
            return dataclasses.replace(found, stale=self.stale + 1)
        return dataclasses.replace(found, best=value, best_step=self.step, stale=0) if value == value else found


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a figure is better: of a loss the lower, of anything else the higher; what is no number never is."""
    return value < than if name.endswith("loss") else value > than


START = Progress()
