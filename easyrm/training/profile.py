"""A profiler trace of a few steps, for TensorBoard or Perfetto."""

import jax
from etils import epath

from easyrm.errors import InputError


def parse_profile_steps(text: str) -> tuple[int, int] | None:
    """(first, last) step of "10,13"; None for "". Raises InputError for anything else."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise InputError(f"--profile_steps={text}: give the first and the last step, as in --profile_steps=10,13")
    return int(parts[0]), int(parts[1])


class Profile:
    """Traces the steps of `--profile_steps` into `<directory>/profile`."""

    def __init__(self, steps: str, directory: epath.Path):
        self._steps, self._directory = parse_profile_steps(steps), directory / "profile"

    def before(self, step: int) -> None:
        """Start tracing where `step` is the first to be traced."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._directory))

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Stop tracing where `step` is the last, once its metrics are computed."""
        if self._steps and step == self._steps[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
