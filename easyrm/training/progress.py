"""Where a run stands."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` steps taken, `position` pairs consumed, the evaluation of this step or that it waits.

    `metrics` are the evaluation's figures, empty where there was none; `pending_eval`: it was due and cut short.
    """

    step: int = 0
    position: int = 0
    pending_eval: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def after(self, step: int, batch_size: int) -> "Progress":
        """The progress of a run that went on from here to `step`."""
        return Progress(step, self.position + (step - self.step) * batch_size)


START = Progress()
