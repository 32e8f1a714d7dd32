"""What becomes of a step whose numbers are not finite, and the record of it."""

import json
import math
from collections.abc import Callable

import jax
from etils import epath

from easyrm.errors import NonFiniteLoss
from easyrm.files import write_atomically

_SHOWN = 8  # pairs that a message names
NUMBERS = ("loss", "grad_norm", "param_norm")


class NonFinite:
    """Stops a run at numbers that are not finite, or, with `skip`, at more than `most` such steps in a row.

    Each is a line of `<directory>/nonfinite.jsonl`: step, numbers, and file:line of its pairs. `skipped` counts the
    updates left out since the run was started or resumed.
    """

    def __init__(self, directory: epath.Path, *, skip: bool, most: int):
        self._path, self._skip, self._most = directory / "nonfinite.jsonl", skip, most
        self._in_a_row = self.skipped = 0

    def met(self, step: int, values: dict[str, float], pairs: Callable[[], list[str]]) -> bool:
        """Whether `step` was left out; `pairs` names its pairs. Raises NonFiniteLoss where the run has to stop."""
        if all(math.isfinite(values[name]) for name in NUMBERS):
            self._in_a_row = 0
            return False
        # Parameters that overflow by the update itself were changed; a bad loss or gradient never reaches them.
        applied = all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))
        self._in_a_row += 1
        stops = applied or not self._skip or self._in_a_row > self._most
        self._record(step, values, pairs(), skipped=not stops)
        if stops:
            message = self._message(step, values, pairs(), applied=applied)
            raise NonFiniteLoss(message, step, before=not applied and not self._skip)
        self.skipped += 1
        return True

    def _record(self, step: int, values: dict[str, float], pairs: list[str], *, skipped: bool) -> None:
        if jax.process_index() != 0:
            return
        line = {"step": step, **{name: str(values[name]) for name in NUMBERS}, "pairs": pairs, "skipped": skipped}
        try:
            before = self._path.read_text() if self._path.exists() else ""
            write_atomically(self._path, before + json.dumps(line) + "\n")
        except Exception as error:  # a bucket's client has errors of its own
            print(
                f"warning: {self._path} cannot be written ({error}); its line would be {json.dumps(line)}", flush=True
            )

    def _message(self, step: int, values: dict[str, float], pairs: list[str], *, applied: bool) -> str:
        numbers = "loss {loss}, gradient norm {grad_norm}, parameter norm {param_norm}".format(**values)
        row = f", number {self._in_a_row} such step in a row" if self._in_a_row > 1 else ""
        shown = ", ".join(pairs[:_SHOWN]) + (f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else "")
        allow = "raise --max_nonfinite" if self._skip else "leave such updates out with --on_nonfinite=skip"
        last = "" if applied else f", or {allow}"  # parameters that have overflowed cannot be left out
        return f"step {step}: {numbers}{row}; lower --optimizer.lr, look at its pairs ({shown}){last}"
