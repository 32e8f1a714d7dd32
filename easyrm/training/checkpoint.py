"""Orbax checkpoints of a run: parameters, moments, stream position and configuration, one composite step.

Every step carries a digest of each array and of its own small record, so that no damage goes unnoticed.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from easyrm.digests import digests
from easyrm.errors import InputError, SaveFailed
from easyrm.files import sha256_of, write_atomically
from easyrm.sharding import path_name
from easyrm.training.progress import Progress
from easyrm.training.retention import Retention, readers_of
from easyrm.training.step import TrainState

# What reading a damaged step raises. All else, such as a bucket's own errors, leaves the step where it is.
_DAMAGE = (FileNotFoundError, NotADirectoryError, EOFError, LookupError, TypeError, AttributeError, ValueError)
_NOT_DAMAGE_CODES = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "CANCELLED",
    "ABORTED",
    "INTERNAL",
    "UNKNOWN",
)


class _Damaged(ValueError):
    """A step that is not what was written; the message says in what."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: `Interrupt` alone counts JAX's preemption sync points."""
        return False


class Checkpoints:
    """The steps under `directory` (local or gs://); saving is asynchronous, and leaving the context waits for it.

    A step is named after the steps of training taken. Steps that were not written to their end do not count; one whose
    record or arrays are damaged is named, set aside as damaged-STEP, and the one before is taken.
    """

    def __init__(
        self, directory: str | epath.Path, retention: Retention, *, strict: bool, say: Callable[[str], None] = print
    ):
        """`strict`: a save that fails raises SaveFailed; else it is said, and the next save is the next try."""
        self._directory, self._retention, self._strict, self._say = _absolute(directory), retention, strict, say
        self._writing: int | None = None
        _quiet_orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=retention, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        self._manager = _Manager(self._directory, options=options)
        self._records: dict[int, dict[str, Any]] = {}
        for step in sorted(self._manager.all_steps()):
            try:
                self._records[step] = _read_record(self._manager, step)
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
                self._say(f"warning: closing the checkpoints: {_reason(error)}")

    def newest(self) -> Progress | None:
        """Where the newest complete step stands, or None."""
        steps = [step for step in self._records if step != self._writing]
        return self._progress(max(steps)) if steps else None

    def _progress(self, step: int) -> Progress:
        record = self._records[step]
        return Progress(step, record["position"], record["pending_eval"], record["metrics"])

    def save(self, state: TrainState, progress: Progress, record: dict[str, Any]) -> None:
        """Start writing a step, after waiting for the one before; `record` is the run's config.json.

        A step that is saved already stays as it is. Raises SaveFailed where `strict`.
        """
        self.settle()
        step = progress.step
        if step in self._records:
            return
        trees = {"model": state.model, "optimizer": state.optimizer}
        values = {**dataclasses.asdict(progress), "arrays": _described(trees)}
        self._writing, self._records[step] = step, values  # before the save, for what is kept is decided in it
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
                    stream=ocp.args.JsonSave({**values, "sha256": sha256_of(values)}),
                    config=ocp.args.JsonSave(record),
                ),
                force=True,
            )
        except Exception as error:
            self._writing = None
            self._failed(step, error)

    def evaluated(self, progress: Progress) -> None:
        """Note the figures of a step whose evaluation was pending when it was saved."""
        record = {**self._records[progress.step], "pending_eval": False, "metrics": progress.metrics}
        self._records[progress.step] = record
        if jax.process_index() == 0:
            text = json.dumps({**record, "sha256": sha256_of(record)})
            write_atomically(self._directory / str(progress.step) / "stream" / "metadata", text)

    def settle(self) -> None:
        """Wait until nothing is being written. Raises SaveFailed where that failed and `strict`."""
        step, self._writing = self._writing, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int | None, error: Exception) -> None:
        self._records.pop(step, None)
        with contextlib.suppress(Exception):  # a bucket that is away; what is left, the next start removes
            if jax.process_count() == 1:  # with more, others may still be writing there
                for path in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                    path.rmtree(missing_ok=True)
        with contextlib.suppress(Exception):
            self._manager.reload()
        newest = self.newest()
        before = f"the newest complete one is step {newest.step}" if newest else "there is no complete one yet"
        name = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        message = f"{name} was not written ({_reason(error)}); {before}"
        if self._strict:
            raise SaveFailed(f"{message}; --strict_saves ends the run") from error
        self._say(f"warning: {message}; training goes on to the next save")
        error.__traceback__ = None  # it holds arrays and coroutines of the failed save
        gc.collect()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress] | None:
        """(state, progress) of the newest step that is whole, on whatever mesh `abstract` names; None without one.

        Raises InputError where a step's arrays have other names, shapes or dtypes than `abstract`, and, with several
        processes, where a step had to be set aside: the next start takes the one before.
        """
        while newest := self.newest():
            trees = {"model": abstract.model, "optimizer": abstract.optimizer}
            try:
                found = _restore(self._manager, newest.step, trees, self._records[newest.step]["arrays"])
            except Exception as error:
                self._set_aside(newest.step, error)
            else:
                sound = jax.device_put(True, abstract.sound.sharding)
                return TrainState(found["model"], found["optimizer"], sound), newest
        self._refuse_a_new_beginning()
        return None

    def _refuse_a_new_beginning(self) -> None:
        if not self._records and any(self._directory.glob("damaged-*")):
            raise InputError(
                f"{self._directory}: no checkpoint is whole, those that are damaged are set aside as damaged-*; bring "
                "one back, choose another --output_dir, or remove them to begin anew"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        if not _is_damage(error):
            raise error
        self._records.pop(step, None)
        taken = sum(1 for _ in self._directory.glob(f"damaged-{step}*"))
        aside = self._directory / (f"damaged-{step}" + (f"-{taken + 1}" if taken else ""))
        with contextlib.suppress(FileNotFoundError):  # another process did it
            (self._directory / str(step)).rename(aside)
        message = f"the checkpoint of step {step} is damaged ({_reason(error)}); it is set aside as {aside.name}"
        if jax.process_count() > 1:  # the others may be waiting for this process inside Orbax
            raise InputError(f"{message}; run the same command again to resume from the one before") from error
        self._manager.reload()
        self._say(f"warning: {message}")


def restore_model(directory: str | epath.Path, step: int | None, model: Any) -> tuple[Any, int]:
    """(parameters, step) of one step, the newest where `step` is None, without Adam's moments.

    `model` is abstract: shapes, dtypes and shardings. A training run that goes on meanwhile keeps the step until it is
    read. Raises InputError where there is no such complete step, and where it is damaged.
    """
    directory = _absolute(directory)
    options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True)
    with _Manager(directory, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            there = f"complete steps are {steps}" if steps else "it holds no complete step"
            raise InputError(f"{directory}{'' if step is None else f' has no step {step}'}: {there}")
        step = steps[-1] if step is None else step
        with _reading(directory, step):
            try:
                record = _read_record(manager, step)
                expected = {name: about for name, about in record["arrays"].items() if name.startswith("model/")}
                found = _restore(manager, step, {"model": model}, expected)
            except Exception as error:
                if not _is_damage(error):
                    raise
                others = [str(other) for other in steps if other != step]
                instead = f"use {directory}/{others[-1]}" if others else "there is no other step"
                raise InputError(f"{directory}/{step}: damaged ({_reason(error)}); {instead}") from error
    return found["model"], step


@contextlib.contextmanager
def _reading(directory: epath.Path, step: int) -> Iterator[None]:
    """Tell a run that goes on in this directory to keep `step`. One that cannot be written is read all the same."""
    lease = readers_of(directory) / f"{step}-{uuid.uuid4().hex}"
    try:
        lease.parent.mkdir(exist_ok=True)
        lease.write_text(f"{time.time():.0f}")
    except Exception:  # a bucket's client has errors of its own
        lease = None
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            if lease is not None:
                lease.unlink(missing_ok=True)


def _read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    record = manager.restore(step, args=ocp.args.Composite(stream=ocp.args.JsonRestore())).stream
    if not isinstance(record, dict) or record.pop("sha256", None) != sha256_of(record) or record["step"] != step:
        raise _Damaged("its record does not match its checksum")
    return record


def _restore(manager: ocp.CheckpointManager, step: int, trees: dict[str, Any], expected: dict[str, list]) -> dict:
    """The arrays of a step like the abstract `trees`, checked against what its record says of each."""
    before = {name: [dtype, shape] for name, (dtype, shape, _) in expected.items()}
    kinds = _kinds(trees)
    if different := [name for name in {**kinds, **before} if kinds.get(name) != before.get(name)]:
        name = different[0]
        raise InputError(
            f"{manager.directory}/{step}: of another model or optimizer: {len(different)} arrays differ, {name} is "
            f"{before.get(name, 'absent')} there and {kinds.get(name, 'absent')} here; give the settings of that run, "
            "or choose another directory"
        )
    args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**args))
    found = {name: restored[name] for name in trees}
    if different := [name for name, digest in digests(found).items() if digest != expected[name][2]]:
        raise _Damaged(f"the values of {', '.join(different[:3])} are not those that were saved")
    return found


def _described(trees: dict[str, Any]) -> dict[str, list]:
    """{path: [dtype, shape, digest]} of every array."""
    kinds = _kinds(trees)
    return {name: [*kinds[name], digest] for name, digest in digests(trees).items()}


def _kinds(trees: dict[str, Any]) -> dict[str, list]:
    return {
        path_name(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]
    }


def _is_damage(error: Exception) -> bool:
    """Whether the step itself is to blame, rather than a bucket that does not answer or a lack of memory."""
    codes = any(str(error).startswith(code) for code in _NOT_DAMAGE_CODES)
    return isinstance(error, _DAMAGE) and not isinstance(error, InputError) and not codes


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


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


def _absolute(directory: str | epath.Path) -> epath.Path:
    # Orbax takes a relative path, and fails in the background when it writes there.
    directory = epath.Path(directory)
    return directory if "://" in str(directory) else directory.resolve()
