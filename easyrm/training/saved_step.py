"""One checkpointed step, read and compared with what it says of itself.

Every step carries a digest of each array and a checksum of its own small record, so that no damage goes unnoticed.
"""

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from easyrm.digests import digests
from easyrm.errors import InputError, one_line
from easyrm.files import absolute, sha256_of, write_atomically
from easyrm.sharding import path_name
from easyrm.training.progress import Progress
from easyrm.training.retention import readers_of

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


class Manager(ocp.CheckpointManager):
    """Orbax's, which asks JAX for no preemption."""

    def reached_preemption(self, step: int) -> bool:
        """False: `Interrupt` alone counts JAX's preemption sync points."""
        return False


def restore_model(directory: str | epath.Path, step: int | None, model: Any) -> tuple[Any, int]:
    """(parameters, step) of one step, the newest where `step` is None, without Adam's moments.

    `model` is abstract: shapes, dtypes and shardings. A training run that goes on meanwhile keeps the step until it is
    read. Raises InputError where there is no such complete step, and where it is damaged.
    """
    directory = absolute(directory)
    options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True)
    with Manager(directory, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(f"{directory}: it holds no complete step")
        if step not in (None, *steps):
            raise InputError(f"{directory} has no step {step}; complete steps are {steps}")
        step = steps[-1] if step is None else step
        with _reading(directory, step):
            try:
                record = read_record(manager, step)
                expected = {name: about for name, about in record["arrays"].items() if name.startswith("model/")}
                found = restore_arrays(manager, step, {"model": model}, expected)
            except Exception as error:
                if not is_damage(error):
                    raise
                others = [str(other) for other in steps if other != step]
                instead = f"use {directory}/{others[-1]}" if others else "there is no other step"
                raise InputError(f"{directory}/{step}: damaged ({one_line(error)}); {instead}") from error
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


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record of a step. Raises what `is_damage` knows where it is not the one that was written."""
    record = manager.restore(step, args=ocp.args.Composite(stream=ocp.args.JsonRestore())).stream
    if not isinstance(record, dict) or record.pop("sha256", None) != sha256_of(record) or record["step"] != step:
        raise _Damaged("its record does not match its checksum")
    return record


def restore_arrays(manager: ocp.CheckpointManager, step: int, trees: dict[str, Any], expected: dict[str, list]) -> dict:
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


def make_record(progress: Progress, trees: dict[str, Any]) -> dict[str, Any]:
    """What a step says of itself: the progress, and [dtype, shape, digest] of every array by path."""
    kinds = _kinds(trees)
    arrays = {name: [*kinds[name], digest] for name, digest in digests(trees).items()}
    return {**dataclasses.asdict(progress), "arrays": arrays}


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its checksum, as it is written."""
    return {**record, "sha256": sha256_of(record)}


def rewrite_record(directory: epath.Path, record: dict[str, Any]) -> None:
    """Replace the record of a step that is written already."""
    write_atomically(directory / str(record["step"]) / "stream" / "metadata", json.dumps(signed(record)))


def _kinds(trees: dict[str, Any]) -> dict[str, list]:
    return {
        path_name(path): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]
    }


def is_damage(error: Exception) -> bool:
    """Whether the step itself is to blame, rather than a bucket that does not answer or a lack of memory."""
    while type(error) is Exception and (cause := error.__cause__ or error.__context__):  # as Orbax wraps TensorStore's
        error = cause
    codes = any(str(error).startswith(code) for code in _NOT_DAMAGE_CODES)
    return isinstance(error, _DAMAGE) and not isinstance(error, InputError) and not codes
