"""From a step's device metrics to a line of metrics.jsonl, fetched a step late so that the devices never wait."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from easyrm.chips import PEAK_BF16_FLOPS, training_flops
from easyrm.data.packing import RowBatch
from easyrm.data.store import PairStore
from easyrm.models.config import LlamaConfig
from easyrm.training.nonfinite import NonFinite


class _Pending(NamedTuple):
    step: int
    metrics: dict[str, jax.Array]
    indices: np.ndarray
    tokens_computed: int


class StepReport:
    """Turns each step's metrics into a line for `write`, when the next step has been started.

    `step_time` is seconds from the end of one step to the end of the next. `mfu` is given where the chip's peak is
    known: what the pairs need at least, over what the devices could have done.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        *,
        log_freq: int,
        schedule: optax.Schedule,
        llama: LlamaConfig,
        pairs: PairStore,
        nonfinite: NonFinite,
    ):
        self._write, self._log_freq, self._schedule = write, log_freq, schedule
        self._llama, self._pairs, self._nonfinite = llama, pairs, nonfinite
        self._pending: _Pending | None = None
        peak = PEAK_BF16_FLOPS.get(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin timing anew, after something that is not training."""
        self._began = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray, batch: RowBatch) -> None:
        """Take a step that was just started, and report the one before it."""
        self.flush()
        self._pending = _Pending(step, metrics, indices, batch.tokens.size)

    def flush(self) -> None:
        """Report the step that is still open, if there is one. Raises NonFiniteLoss as `NonFinite.met` does."""
        if self._pending is None:
            return
        (step, metrics, indices, computed), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        if self._nonfinite.met(step, values, lambda: [self._pairs[index].where for index in indices]):
            self._write({"step": step, "skipped": self._nonfinite.skipped, "pairs": len(indices)})
            return
        if step % self._log_freq:
            return
        chosen, prompt, rejected = self._pairs.lengths(indices).reshape(-1, 3).T
        unique = int((chosen + prompt + rejected).sum())
        again = int(prompt[chosen + rejected > 0].sum())  # of a unit with one response, all is prompt
        line = {
            "step": step,
            **values,
            "learning_rate": float(self._schedule(step - 1)),
            "pairs": len(indices),
            "pairs_per_second": len(indices) / seconds,
            "tokens_per_second": (unique + again) / seconds,
            "tokens_computed": computed,
            "tokens_unique": unique,
            "step_time": seconds,
        }
        if self._peak:
            visible = sum(side * prompt + side * (side + 1) // 2 for side in (chosen, rejected))
            visible = int((visible + prompt * (prompt + 1) // 2).sum())
            line["mfu"] = training_flops(self._llama, unique, visible) / seconds / self._peak
        self._write(line)
