"""Ctrl-C and SIGTERM as a wish to stop after the current step, on which all processes agree."""

import signal

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """A context in which the first SIGINT or SIGTERM is noted, and a second SIGINT ends the process as usual.

    With several processes, SIGTERM belongs to JAX's preemption service, which brings them to one step, and SIGINT ends
    the process that gets it.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        caught = [] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer on every process. Every process calls it at every step."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False
