"""The small run of benchmarks.faults, how it must end, and the count of what it survived."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.small_run import Child, SmallRun, figures, saved_steps


class NotSurvived(Exception):
    """A run that a fault has damaged; the message says in what."""


def expect(condition: object, otherwise: str) -> None:
    """Raise NotSurvived, which says `otherwise`, unless the condition holds."""
    if not condition:
        raise NotSurvived(otherwise)


class Bench:
    """The run, how it ends without a fault and how long that takes, and the source of the random moments."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.run = SmallRun(folder / "inputs", steps=120, batch_size=64, save_freq=10, eval_freq=20, heldout=800)
        with self.place("uninterrupted") as place, place.start() as child:
            expect(child.wait() == 0, "the run without a fault fails")
            self.result = place.result()
            self.seconds = {"start": child.time_of("pad token"), "end": child.time_of("exported to")}
            self.seconds["compile"] = child.time_of("compiled") - child.time_of(r"\d+ steps of")

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator["Place"]:
        """A folder for a run, removed unless something is raised."""
        place = Place(self, self.folder / name.replace(" ", "_"))
        yield place
        shutil.rmtree(place.folder)


class Place:
    """A directory that a run is started in again and again, with its own cache of compiled programs and log."""

    def __init__(self, bench: Bench, folder: Path):
        folder.mkdir()
        self.bench, self.folder, self.output, self.log = bench, folder, folder / "run", folder / "log"
        self.cache = folder / "cache"

    def start(self, **more) -> Child:
        """The same command, once more."""
        return self.bench.run.start(self.output, self.cache, self.log, **more)

    def result(self) -> tuple[list[dict], bytes]:
        """All that must be equal: the figures of each step and evaluation, and the exported weights."""
        return figures(self.output), (self.output / "export" / "model.safetensors").read_bytes()

    def newest(self) -> int:
        """The newest complete checkpoint, or 0."""
        return max(saved_steps(self.output), default=0)

    def check_result(self, expected: tuple[list[dict], bytes] | None = None) -> None:
        """Raise NotSurvived where this differs from the run without a fault."""
        lines, weights = self.result()
        expected_lines, expected_weights = expected or self.bench.result
        pairs = zip(lines, expected_lines, strict=False)
        different = next((f"{a} instead of {b}" for a, b in pairs if a != b), None)
        expect(different is None, f"other figures: {different}")
        expect(len(lines) == len(expected_lines), f"{len(lines)} lines of metrics instead of {len(expected_lines)}")
        expect(weights == expected_weights, "other weights in the export")

    def finish(self, row: "Row", newest: int | None = None) -> Child:
        """Start once more, to the end; `newest`: the checkpoint from which it must go on."""
        with self.start() as child:
            expect(child.wait() == 0, f"started again, it ended with status {child.wait()}")
        if newest is not None:
            expect(child.resumed() == newest, f"went on from step {child.resumed()}, though {newest} was complete")
        row.recovered(child)
        self.check_result()
        return child


class Row:
    """One line of the table."""

    def __init__(self, fault: str):
        self.fault, self.tried, self.survived, self.repeated, self.seconds = fault, 0, 0, 0, 0.0
        self.moments: dict[str, int] = {}
        self.problems: list[str] = []

    @contextlib.contextmanager
    def series(self, bench: Bench) -> Iterator[Place]:
        """A place for tries, which are survived if nothing is raised in it."""
        before = self.tried
        folder = bench.folder / f"{self.fault} {before + 1}".replace(" ", "_")
        try:
            with bench.place(folder.name) as place:
                yield place
        except (NotSurvived, subprocess.TimeoutExpired) as error:
            self.tried = max(self.tried, before + 1)
            self.problems.append(f"{self.fault} {before + 1}: {error}; see {folder / 'log'}")
            print(f"NOT SURVIVED  {self.problems[-1]}", flush=True)
        else:
            self.survived += self.tried - before

    def count(self, moment: str, about: str) -> None:
        """One more try."""
        self.tried += 1
        self.moments[moment] = self.moments.get(moment, 0) + 1
        print(f"{self.fault} {self.tried}: {moment}; {about}", flush=True)

    def lost(self, reached: int, newest: int, save_freq: int) -> None:
        """Account for a process that printed the step `reached` and left the checkpoint `newest`."""
        self.repeated = max(self.repeated, reached - newest)
        # Each save waits for the one before, so that only the last one can be incomplete.
        due = reached // save_freq * save_freq
        expect(newest >= due - save_freq, f"step {reached} was reached, but {newest} is the newest that is complete")

    def recovered(self, child: Child) -> None:
        """Account for a restart."""
        if child.last_step():
            self.seconds = max(self.seconds, child.time_of(r"step \d+/"))

    def cells(self) -> tuple[str, ...]:
        return self.fault, str(self.tried), str(self.survived), str(self.repeated), f"{self.seconds:.1f}"
