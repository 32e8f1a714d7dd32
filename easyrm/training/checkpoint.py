"""The checkpoints of a run, by Orbax: parameters, moments, progress and configuration, one composite step."""

import contextlib
import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from easyrm.errors import InputError, SaveFailed, Unavailable, one_line, writing
from easyrm.files import absolute
from easyrm.training.progress import Progress
from easyrm.training.retention import Retention
from easyrm.training.saved_step import (
    Manager,
    is_damage,
    make_record,
    read_record,
    restore_arrays,
    rewrite_record,
    signed,
)
from easyrm.training.step import TrainState


class Checkpoints:
    """The steps under `directory` (local or gs://); saving is asynchronous, and leaving the context waits for it.

    A step is named after the steps of training taken. Steps that were not written to their end do not count; one whose
    record or arrays are damaged is named, set aside in `damaged` beside `directory`, and the one before is taken.
    """

    def __init__(
        self, directory: str | epath.Path, retention: Retention, *, strict: bool, say: Callable[[str], None] = print
    ):
        """`strict`: a save that fails raises SaveFailed; else it is said, and the next save is the next try."""
        self._directory, self._strict, self._say = absolute(directory), strict, say
        self._writing: int | None = None
        self._damaged = self._directory.parent / "damaged"
        _quiet_orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=retention, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        with writing(f"--output_dir={self._directory.parent}"):
            self._manager = Manager(self._directory, options=options)
        self._records: dict[int, dict[str, Any]] = {}
        for step in sorted(self._manager.all_steps()):
            try:
                self._records[step] = read_record(self._manager, step)
            except Exception as error:
                self._set_aside(step, error)
        self._refuse_a_new_beginning()
        retention.follow(self._directory, lambda step: self._records[step]["metrics"] if step in self._records else {})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Also when training fails: a checkpoint that is being written must become complete.
        try:
            self.settle()
        finally:
            try:
                self._manager.close()
            except Exception as error:  # Orbax may raise once more what `settle` has told
                self._say(f"warning: closing the checkpoints: {one_line(error)}")

    def newest(self) -> Progress | None:
        """Where the newest complete step stands, or None."""
        steps = [step for step in self._records if step != self._writing]
        return self._progress(max(steps)) if steps else None

    def _progress(self, step: int) -> Progress:
        record = self._records[step]
        known = {field.name for field in dataclasses.fields(Progress)}
        return Progress(**{name: value for name, value in record.items() if name in known})

    def save(self, state: TrainState, progress: Progress, record: dict[str, Any]) -> None:
        """Start writing a step, after waiting for the one before; `record` is the run's config.json.

        A step that is saved already stays as it is. Raises SaveFailed where `strict`.
        """
        self.settle()
        step = progress.step
        if step in self._records:
            return
        trees = {"model": state.model, "optimizer": state.optimizer}
        # Noted before the save, for what is kept is decided in it.
        self._writing, self._records[step] = step, make_record(progress, trees)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
                    stream=ocp.args.JsonSave(signed(self._records[step])),
                    config=ocp.args.JsonSave(record),
                ),
                force=True,
            )
        except Exception as error:
            self._writing = None
            self._failed(step, error)

    def evaluated(self, progress: Progress) -> None:
        """Note the figures of a step whose evaluation was pending when it was saved."""
        record = self._records[progress.step] | dataclasses.asdict(progress)
        self._records[progress.step] = record
        if jax.process_index() == 0:
            rewrite_record(self._directory, record)

    def check(self) -> None:
        """Tell of a save that has failed since. Raises SaveFailed where `strict`."""
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written. Raises SaveFailed where that failed and `strict`."""
        step, self._writing = self._writing, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int | None, error: Exception) -> None:
        self._records.pop(step, None)
        if jax.process_count() == 1:  # with more, others may still be writing there
            self._remove_unfinished(step)
        with contextlib.suppress(Exception):
            self._manager.reload()
        newest = self.newest()
        before = f"the newest complete one is step {newest.step}" if newest else "there is no complete one yet"
        name = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        message = f"{name} was not written ({one_line(error)}); {before}"
        if self._strict:
            raise SaveFailed(f"{message}; --strict_saves ends the run") from error
        self._say(f"warning: {message}; training goes on to the next save")
        error.__traceback__ = None  # it holds arrays and coroutines of the failed save
        gc.collect()

    def _remove_unfinished(self, step: int | None) -> None:
        """Remove what a failed save left. Threads of Orbax may still be writing there, so it is looked at again."""
        for _ in range(20):
            with contextlib.suppress(Exception):  # a bucket that is away; what is left, the next start removes
                left = list(self._directory.glob(f"{step}.orbax-checkpoint-tmp*"))
                for path in left:
                    path.rmtree(missing_ok=True)
                if not left:
                    return
            time.sleep(0.05)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress] | None:
        """(state, progress) of the newest step that is whole, on whatever mesh `abstract` names; None without one.

        Raises InputError where a step's arrays have other names, shapes or dtypes than `abstract`, and Unavailable
        where one of several processes had to set a step aside: the next start takes the one before.
        """
        while newest := self.newest():
            trees = {"model": abstract.model, "optimizer": abstract.optimizer}
            try:
                found = restore_arrays(self._manager, newest.step, trees, self._records[newest.step]["arrays"])
            except Exception as error:
                self._set_aside(newest.step, error)
            else:
                sound = jax.device_put(True, abstract.sound.sharding)
                return TrainState(found["model"], found["optimizer"], sound), newest
        self._refuse_a_new_beginning()
        return None

    def _refuse_a_new_beginning(self) -> None:
        if not self._records and self._damaged.exists() and any(self._damaged.iterdir()):
            raise InputError(
                f"{self._directory}: no checkpoint is whole, those that were damaged lie in {self._damaged}; bring one "
                "back, choose another --output_dir, or remove them to begin anew"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        if not is_damage(error):
            raise error
        self._records.pop(step, None)
        self._damaged.mkdir(exist_ok=True)
        taken = sum(1 for _ in self._damaged.glob(f"{step}*"))
        aside = self._damaged / (f"{step}-{taken + 1}" if taken else str(step))
        try:
            (self._directory / str(step)).rename(aside)
            where = f"as {aside}"
        except FileNotFoundError:
            where = f"by another process, in {self._damaged}"
        message = f"the checkpoint of step {step} is damaged ({one_line(error)}); it is set aside {where}"
        if jax.process_count() > 1:  # the others may be waiting for this process inside Orbax
            raise Unavailable(f"{message}; run the same command again to resume from the one before") from error
        self._manager.reload()
        self._say(f"warning: {message}")


def _quiet_orbax() -> None:
    """Keep what Orbax logs and drops on the way to a failed save, hundreds of lines, from what is told in one."""
    orbax = str(epath.Path(ocp.__file__).parent)
    if logging.getLogger("asyncio").filters:
        return
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: orbax not in record.pathname + record.getMessage())
    before = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        if code is None or not code.co_filename.startswith(orbax):
            before(unraisable)

    sys.unraisablehook = hook
