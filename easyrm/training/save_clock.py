"""When the next periodic save is due: by steps and by minutes, the same answer on every process."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


class SaveClock:
    """Due every `freq` steps and where `minutes` have passed since the last save (0: never, for either).

    The clock of process 0 decides. With several processes they ask it seldom: when half of the time that is left has
    probably passed.
    """

    def __init__(self, freq: int, minutes: float, step: int):
        """The run goes on after `step`."""
        self._freq, self._seconds = freq, 60 * minutes
        self.saved(step)

    def saved(self, step: int) -> None:
        """Begin counting anew: `step` is being saved."""
        self._step, self._began, self._look = step, time.monotonic(), step + 1

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Every process asks at every step."""
        if self._freq > 0 and step % self._freq == 0:
            return True
        if not self._seconds or step < self._look:
            return False
        elapsed = time.monotonic() - self._began
        if jax.process_count() > 1:
            elapsed = float(multihost_utils.broadcast_one_to_all(np.float32(elapsed)))
            a_step = max(elapsed, 1e-6) / (step - self._step)
            self._look = step + max(1, int((self._seconds - elapsed) / a_step / 2))
        return elapsed >= self._seconds
