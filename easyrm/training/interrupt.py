"""Ctrl-C and SIGTERM as a wish to stop: at once while nothing is unsaved, else at the next step, agreed by all."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from easyrm.errors import Resumable

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context in which the first SIGINT or SIGTERM asks for a stop in good order and the second ends the process.

    With several processes, SIGTERM belongs to JAX's preemption service, which brings them to one common call of
    `requested`, and SIGINT ends the process that gets it, and thereby the run. May be entered before they have met.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._safe: str | None = None
        self._calls = 0
        self._previous = {}

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._note) for number in _NUMBERS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def met(self) -> None:
        """All processes have met. JAX has put its own handler for SIGTERM in place; one process alone never asks it."""
        if jax.process_count() == 1:
            for number in _NUMBERS:
                signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal is not None:
            os._exit(128 + number)
        if jax.distributed.is_initialized() and jax.process_count() > 1:  # SIGINT: SIGTERM is JAX's then
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._safe is not None:
            raise Resumable(self._message(), at_once=True)

    def _message(self) -> str:
        return f"stopped by {self.signal.name} {self._safe}; run the same command again to go on"

    @contextlib.contextmanager
    def nothing_unsaved(self, where: str) -> Iterator[None]:
        """Inside, a signal stops the run at once: raises Resumable, whose message says `where` it was stopped.

        With several processes they stop together, at the next call of `requested`.
        """
        self._safe = where
        if self.signal is not None:
            raise Resumable(self._message())
        try:
            yield
        finally:
            self._safe = None

    def requested(self) -> bool:
        """Whether to stop now; the same answer on every process. Every process calls it at the same places."""
        if jax.process_count() > 1 and self.signal is None:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.signal = signal.SIGTERM
        return self.signal is not None
