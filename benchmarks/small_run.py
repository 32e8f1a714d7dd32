"""A small training run with every phase of a long one, as a process that a benchmark watches, ends and repeats."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from demo.pairs import generate, write_pairs
from demo.run import GENERATED, train_tokenizer, write_model_config

ROOT = Path(__file__).resolve().parents[1]
TIMING = ("pairs_per_second", "tokens_per_second", "step_time", "mfu")  # what no two runs have in common


class SmallRun:
    """Data, a tokenizer and a model shape in `folder`, and the flags of a run on them."""

    def __init__(self, folder: Path, *, steps: int, batch_size: int, save_freq: int, eval_freq: int, heldout: int):
        """`heldout`: pairs of an evaluation."""
        folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.save_freq, self.eval_freq = steps, save_freq, eval_freq
        self.train = folder / "train.jsonl"
        for name, pairs in zip(("train", "heldout"), generate(1000, heldout, 0), strict=True):
            write_pairs(folder / f"{name}.jsonl", pairs)
        size = dataclasses.replace(GENERATED, vocab=400, width=32)
        write_model_config(folder / "model.json", size, train_tokenizer(folder, size))
        self._flags = {
            "data.train": self.train,
            "data.eval": folder / "heldout.jsonl",
            "data.max_length": size.max_length,
            "data.batch_size": batch_size,
            "tokenizer": folder / "tokenizer.model",
            "model.config": folder / "model.json",
            "optimizer.lr": 1e-3,
            "dtype": "fp32",
            "total_steps": steps,
            "save_freq": save_freq,
            "save_minutes": 0,
            "eval_freq": eval_freq,
            "export": "true",
            "export_dtype": "fp32",
        }

    def start(self, output: Path, cache: Path, log: Path, *, devices: int = 1, **environment: str) -> "Child":
        """The run in `output`, on `devices` devices in all, with compiled programs in `cache`; `log` is added to."""
        flags = {**self._flags, "mesh_dim": f"1,{devices},1", "compilation_cache": cache, "output_dir": output}
        command = [sys.executable, "-m", "easyrm.train_rm", *(f"--{name}={value}" for name, value in flags.items())]
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return Child(command, {**os.environ, **settings, **environment}, log)


class Child:
    """A process whose lines, stdout and stderr together, are read as they come; leaving the context kills it."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
        )
        self.pid = self._process.pid
        self.lines: list[tuple[float, str]] = []  # seconds after the start, text
        self._news, self._ended = threading.Condition(), False
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send(signal.SIGKILL)
        self.wait()

    def _read(self, log: Path) -> None:
        with log.open("a") as file:
            for line in self._process.stdout:
                seconds = time.monotonic() - self.began
                file.write(f"{seconds:8.3f} {line}")
                file.flush()
                with self._news:
                    self.lines.append((seconds, line.rstrip("\n")))
                    self._news.notify_all()
            file.write(f"         exit status {self._process.wait()}\n")
        with self._news:
            self._ended = True
            self._news.notify_all()

    def send(self, number: int) -> None:
        """A signal, where the process is still there."""
        self._process.send_signal(number)

    def wait(self, timeout: float = 600) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        status = self._process.wait(timeout)
        self._reader.join()
        return status

    def ended_within(self, seconds: float) -> bool:
        """Whether the process ends in the next `seconds`; returns then, or at that moment."""
        with self._news:
            return self._news.wait_for(lambda: self._ended, seconds)

    def seen(self, pattern: str, timeout: float = 600) -> re.Match | None:
        """The first line that matches, awaited; None where the process ended without one, or did not say it in time."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self.first(pattern), timeout)
            return self.first(pattern)

    def first(self, pattern: str) -> re.Match | None:
        """The first line so far that `pattern` matches from its beginning."""
        matches = (re.match(pattern, line) for _, line in list(self.lines))
        return next((match for match in matches if match), None)

    def time_of(self, pattern: str) -> float:
        """Seconds from the start to the first line that matches. Raises StopIteration where there is none."""
        return next(seconds for seconds, line in list(self.lines) if re.match(pattern, line))

    def last_step(self) -> int:
        """The highest step whose losses were printed, 0 before the first."""
        matches = [re.match(r"step (\d+)/", line) for _, line in list(self.lines)]
        return max((int(match[1]) for match in matches if match), default=0)

    def resumed(self) -> int:
        """The step from which the run went on, 0 where it began anew."""
        match = self.first(r"resumed after step (\d+) of")
        return int(match[1]) if match else 0


def saved_steps(output: Path) -> list[int]:
    """The complete checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def figures(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
