"""metrics.jsonl, the lines or the bar that a person watches, and the optional TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from tqdm import tqdm

from easyrm.config import RunConfig
from easyrm.errors import InputError, Unavailable, one_line
from easyrm.files import absolute, sha256_of, write_atomically
from easyrm.redact import redact_tree
from easyrm.training.progress import Progress

REMOTE_SECONDS = 30.0


class Sink(NamedTuple):
    """Another place for the lines; what it still holds is written by `close`."""

    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


class MetricsLog:
    """Appends one JSON object a line to `<directory>/metrics.jsonl`, of a run that goes on from `start`.

    Lines of what comes after `start`, left by a run that went on past its last checkpoint, are removed. Object stores
    cannot append: there, the file is uploaded whole at most every 30 seconds and at `close`.
    """

    def __init__(self, directory: epath.Path, *, start: Progress, total: int, sinks: Sequence[Sink] = ()):
        self._path = directory / "metrics.jsonl"
        lines, broken = _lines(self._path)
        kept = "".join(text for text, line in lines if _precedes(line, start))
        write_atomically(self._path, kept)
        self._remote = "://" in str(directory)
        # Unbuffered: what a full disk does not take is known, and tried again with the next line.
        self._file = tempfile.TemporaryFile(buffering=0) if self._remote else open(self._path, "ab", 0)  # noqa: SIM115
        self._unwritten, self._failing = kept.encode() if self._remote else b"", False
        self._uploaded = time.monotonic()
        self._bar = tqdm(initial=start.step, total=total, unit="step") if sys.stderr.isatty() else None
        self._total = total
        if broken:
            self.say(f"warning: {self._path}: {broken} lines are not JSON objects of a step and are left out")
        self._sinks = sinks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Keep one line; `step` must be among the keys. What cannot be written waits for the next, and that is said."""
        self._unwritten += json.dumps(metrics).encode() + b"\n"
        self._flush(upload=time.monotonic() - self._uploaded > REMOTE_SECONDS)
        for sink in self._sinks:
            sink.write(metrics)
        self._show(metrics)

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        with contextlib.suppress(OSError):  # stdout on a full disk
            tqdm.write(line) if self._bar is not None else print(line, flush=True)

    def _show(self, metrics: dict[str, Any]) -> None:
        if "skipped" in metrics:
            self.say(f"step {metrics['step']}/{self._total}  skipped: loss or gradient not finite (nonfinite.jsonl)")
        elif "loss" not in metrics:
            text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if key != "step")
            self.say(f"step {metrics['step']}  {text}")
        elif self._bar is not None:
            self._bar.update(metrics["step"] - self._bar.n)
            self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", accuracy=f"{metrics['accuracy']:.3f}")
        else:
            self.say(
                f"step {metrics['step']}/{self._total}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
                f"  margin {metrics['margin']:+.3f}  lr {metrics['learning_rate']:.2e}"
                f"  {metrics['pairs_per_second']:.1f} pairs/s  {metrics['step_time']:.3f} s"
            )

    def _flush(self, *, upload: bool) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            if self._remote and upload:
                self._uploaded = time.monotonic()
                self._file.seek(0)
                self._path.write_bytes(self._file.read())
        except Exception as error:  # a bucket's client has errors of its own
            if not self._failing:
                self.say(f"warning: {self._path} cannot be written ({error}); its lines are kept and tried again")
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Write out what is left."""
        self._flush(upload=True)
        if self._failing:
            self.say(f"warning: the last lines of {self._path} are lost")
        self._file.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # the libraries raise errors of their own
                self.say(f"warning: the last metrics may be missing outside of {self._path} ({error})")
        if self._bar is not None:
            self._bar.close()


class QuietLog:
    """What every process but the first has for a MetricsLog."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, metrics: dict[str, Any]) -> None:
        """Nothing: process 0 writes."""


def open_metrics(
    config: RunConfig, directory: epath.Path, record: dict[str, Any], start: Progress
) -> MetricsLog | QuietLog:
    """The log of a run that goes on from `start`, with the sinks that `config` asks for."""
    if jax.process_index() != 0:
        return QuietLog()
    sinks = []
    if config.tensorboard:
        sinks.append(_tensorboard_sink(directory, start))
    if config.wandb_project:
        sinks.append(_wandb_sink(config.wandb_project, directory, record, start))
    return MetricsLog(directory, start=start, total=record["total_steps"], sinks=sinks)


def check_sinks(config: RunConfig) -> None:
    """Raise InputError where a package of a sink that `config` asks for is not installed."""
    for asked, package, extra in (
        ("--tensorboard=true" * config.tensorboard, "tensorboardX", "tensorboard"),
        (config.wandb_project and f"--wandb_project={config.wandb_project}", "wandb", "wandb"),
    ):
        if asked and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise InputError(f"{asked} needs {package}: pip install -e '.[{extra}]'")


def read_metrics(directory: epath.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; empty where there is none."""
    return [line for _, line in _lines(directory / "metrics.jsonl")[0]]


def _precedes(line: dict[str, Any], start: Progress) -> bool:
    # An evaluation that a checkpoint calls pending is made anew.
    evaluation = any(key.startswith("eval/") for key in line)
    return line["step"] < start.step + (not evaluation or not start.pending_eval)


def _lines(path: epath.Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """([(text, object)], how many lines are broken); a last one without its newline was being written and is none."""
    found, broken = [], 0
    for text in path.read_bytes().decode(errors="replace").splitlines(True) if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append((text, line))
        else:
            broken += text.endswith("\n")
    return found, broken


def _tensorboard_sink(directory: epath.Path, start: Progress) -> Sink:
    """A sink for TensorBoard event files under `<directory>/tensorboard` (extra `tensorboard`)."""
    from tensorboardX import SummaryWriter

    # Readers then leave out what an earlier process wrote past the checkpoint, and is written again.
    resumed = {"purge_step": start.step + 1} if start.step else {}
    writer = SummaryWriter(str(directory / "tensorboard"), **resumed)

    def write(metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return Sink(write, writer.close)


def _wandb_sink(project: str, directory: epath.Path, record: dict[str, Any], start: Progress) -> Sink:
    """A sink for the Weights & Biases run of the output directory, which resumes with it (extra `wandb`).

    Only the redacted configuration and the metrics are sent.
    """
    import wandb

    # Else wandb sends the command line, the git remote and all that is printed, and a secret may be in each.
    settings = wandb.Settings(x_disable_meta=True, disable_git=True, save_code=False, console="off")
    try:
        run = wandb.init(
            project=project,
            name=directory.name,
            id=sha256_of({"directory": str(absolute(directory))})[:16],  # two directories may have one name
            resume="allow",
            config=redact_tree(record["config"]),
            settings=settings,
        )
    except Exception as error:
        lasting = {"UsageError", "AuthenticationError"} & {kind.__name__ for kind in type(error).__mro__}  # no login
        raise (InputError if lasting else Unavailable)(
            f"--wandb_project={project}: Weights & Biases does not begin ({one_line(error)}); wandb login, or set "
            "WANDB_MODE=offline"
        ) from error
    # wandb ignores, with a mere warning, what has a lower step than it has seen: what a resumed run writes again goes
    # behind that, as does a run that begins anew in the same place; the true `step` is the axis of every chart.
    shift = max(0, run.step - start.step - (not start.pending_eval))
    run.define_metric("*", step_metric="step")
    return Sink(lambda metrics: run.log(metrics, step=metrics["step"] + shift), run.finish)
