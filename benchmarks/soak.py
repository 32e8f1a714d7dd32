"""Whether a long run grows: memory, open descriptors and threads of one process over thousands of steps.

    python -m benchmarks.soak [--steps=3000] [--output=DIR]

A small run with saves and evaluations, looked at every two seconds. Prints a table over time and one JSON line. The
first fifth of the steps is warm-up; growth is that of the median from the second fifth to the last, for a save has
files and threads of its own while it lasts. Exits 1 where resident memory grows by more than 5 %, or descriptors or
threads by more than 3: what leaks, leaks at each save or evaluation, of which there are dozens.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.small_run import Child, SmallRun

SECONDS, ROWS, MOST_MEMORY, MOST_COUNT = 2.0, 30, 5.0, 3


class Sample(NamedTuple):
    """What the process has at a moment; `rss` in MiB."""

    seconds: float
    step: int
    rss: float
    descriptors: int
    threads: int


def sample(child: Child) -> Sample | None:
    """A look at the process; None where it has ended."""
    folder = Path("/proc") / str(child.pid)
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        descriptors = len(list((folder / "fd").iterdir()))
        rss = int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
    return Sample(time.monotonic() - child.began, child.last_step(), rss, descriptors, int(status["Threads"]))


def watch(child: Child) -> list[Sample]:
    """Samples of the process from its first step to its last."""
    samples = []
    while not child.ended_within(SECONDS) and not child.first("trained "):
        found = sample(child)
        if found and found.step:
            samples.append(found)
    return samples


def growth(samples: list[Sample], steps: int) -> dict[str, float]:
    """From the second to the last fifth of the steps: percent of memory, numbers of descriptors and threads."""
    early = [found for found in samples if 0.2 * steps < found.step <= 0.4 * steps]
    late = [found for found in samples if found.step > 0.8 * steps]
    if not early or not late:
        sys.exit(f"error: --steps={steps} take too short a time for a sample every {SECONDS:g} s; give more steps")

    def medians(name: str) -> tuple[float, float]:
        first, last = (statistics.median(getattr(found, name) for found in part) for part in (early, late))
        return first, last

    (rss, rss_late), *counts = (medians(name) for name in ("rss", "descriptors", "threads"))
    descriptors, threads = (round(last - first, 2) for first, last in counts)
    return {"rss_percent": round(100 * (rss_late / rss - 1), 2), "descriptors": descriptors, "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, help="a folder that is not there yet; a temporary one by default")
    args = parser.parse_args()
    if args.output and args.output.exists():
        sys.exit(f"error: --output={args.output} is there already; name another folder")
    folder = (args.output or Path(tempfile.mkdtemp(prefix="easyrm-soak-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    run = SmallRun(folder / "inputs", steps=args.steps, batch_size=16, save_freq=100, eval_freq=200, heldout=200)
    with run.start(folder / "run", folder / "cache", folder / "log") as child:
        samples = watch(child)
        if status := child.wait():
            sys.exit(f"error: the run ended with status {status}; see {folder / 'log'}")
    if not args.output:
        shutil.rmtree(folder)

    print(f"{'seconds':>8} {'step':>7} {'RSS MiB':>8} {'descriptors':>12} {'threads':>8}")
    for found in samples[:: -(-len(samples) // ROWS)]:
        print(
            f"{found.seconds:8.0f} {found.step:7d} {found.rss:8.0f} {found.descriptors:12d} {found.threads:8d}",
            flush=True,
        )
    result = growth(samples, args.steps)
    print(json.dumps({"steps": args.steps, "samples": len(samples), "growth": result}))
    if result["rss_percent"] > MOST_MEMORY or max(result["descriptors"], result["threads"]) > MOST_COUNT:
        sys.exit(1)


if __name__ == "__main__":
    main()
