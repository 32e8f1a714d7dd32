"""A profiler trace of a few steps, for TensorBoard or Perfetto."""

import jax
from etils import epath

from easyrm.errors import InputError


def parse_profile_steps(text: str) -> tuple[int, int] | None:
    """(first, last) step of "10,13"; None for "". Raises InputError for anything else."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(map(str.isdecimal, map(str.strip, parts))) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise InputError(f"--profile_steps={text}: give the first and the last step, as in --profile_steps=10,13")
    return int(parts[0]), int(parts[1])


class Profile:
    """Traces the steps of `--profile_steps` into `<directory>/profile`, as many as one process runs of them."""

    def __init__(self, steps: str, directory: epath.Path):
        self._first, self._last = parse_profile_steps(steps) or (0, -1)
        self._directory, self._tracing = directory / "profile", False

    def before(self, step: int) -> None:
        """Start tracing where `step` is the first to be traced, or a later one with which the run goes on."""
        if self._first <= step <= self._last and not self._tracing:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Stop tracing where `step` is the last, once its metrics are computed."""
        if step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Write the trace if one is being made."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
