"""Orbax checkpoints of a run: parameters, moments, stream position and configuration, one composite step."""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from easyrm.errors import InputError
from easyrm.training.step import TrainState


class Checkpoints:
    """The steps under `directory` (local or gs://); saving is asynchronous, and leaving the context waits for it.

    A step is named after the optimizer updates made. Steps that were not written to their end do not count.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 2):
        """Keep the newest `keep` steps while saving; the latest is never deleted."""
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(keep))
        self._manager = ocp.CheckpointManager(_absolute(directory), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Also when training fails: a checkpoint that is being written must become complete.
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: int, record: dict[str, Any]) -> None:
        """Start writing a step; `position` is pairs consumed, `record` the run's config.json. Saved steps are kept."""
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(state.model),
                optimizer=ocp.args.StandardSave(state.optimizer),
                stream=ocp.args.JsonSave({"position": position}),
                config=ocp.args.JsonSave(record),
            ),
            force=True,
        )

    def restore(self, step: int, state: TrainState) -> tuple[TrainState, int]:
        """(state, position) of a step; `state` gives shapes, dtypes and shardings, on whatever mesh."""
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(state.model),
                optimizer=ocp.args.StandardRestore(state.optimizer),
                stream=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(found.model, found.optimizer), found.stream["position"]


def restore_model(directory: str | epath.Path, step: int | None, model: Any) -> tuple[Any, int]:
    """(parameters, step) of one step, the newest where `step` is None, without Adam's moments.

    `model` is abstract: shapes, dtypes and shardings. Raises InputError where there is no such complete step.
    """
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(_absolute(directory), options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            there = f"complete steps are {steps}" if steps else "it holds no complete step"
            wanted = "" if step is None else f" has no step {step};"
            raise InputError(f"{directory}{wanted} {there}".replace("; it holds", ": it holds"))
        step = steps[-1] if step is None else step
        found = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(model)))
    return found.model, step


def _absolute(directory: str | epath.Path) -> epath.Path:
    # Orbax takes a relative path, and fails in the background when it writes there.
    directory = epath.Path(directory)
    return directory if "://" in str(directory) else directory.resolve()
