"""What a run survives: killed, asked to stop, short of disk, its files damaged; each time the same command again.

    python -m benchmarks.faults [--kills=50] [--terms=20] [--others=4] [--seed=0] [--output=DIR]

A small run with every phase (first compilation, steps, evaluations, saves, export) is made once without a fault. Under
each fault it must end with the same losses, evaluations and weights, bit for bit. Prints a table and one JSON line;
exits 1 where a fault was not survived, and then keeps the run's folder with the log of all its processes.

"Steps repeated": printed by the process that was killed, and taken again by the next; a save that was being written is
lost, so that more than a save interval is repeated only where steps went on during that save.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.full_disk import small_disk
from benchmarks.small_run import Child
from benchmarks.survival import Bench, Place, Row, expect

RESUMABLE, BAD_INPUT, PEER_SECONDS = 75, 2, 60
# How often a signal is aimed at a moment anywhere in the run's duration, and how often at what is short.
AIMS = {"anywhere": 4, "start": 1, "compile": 2, "save": 3, "evaluation": 2, "export": 2}
SPARE = 200 * 1024  # bytes: too little for a checkpoint
DAMAGES = ("a bit flipped", "cut", "removed")


def await_moment(bench: Bench, child: Child, kind: str, newest: int) -> None:
    """Return at a random moment of this kind, or when the process has ended."""
    run, rng = bench.run, bench.rng
    if kind in ("anywhere", "start"):
        child.ended_within(rng.uniform(0, bench.seconds["start" if kind == "start" else "end"]))
        return
    freq = {"save": run.save_freq, "evaluation": run.eval_freq}.get(kind, run.steps)
    due = [step for step in range(freq, run.steps + 1, freq) if step > newest] or [run.steps]
    pattern = {"compile": r"\d+ steps of", "export": "trained "}.get(kind, f"step {rng.choice(due)}/")
    if child.seen(pattern):
        child.ended_within(rng.uniform(0, {"compile": bench.seconds["compile"]}.get(kind, 0.4)))


def phase(place: Place, child: Child) -> str:
    """In which phase of the run a process has ended."""
    lines = [line for _, line in child.lines]
    if not lines:
        return "start"
    if not child.first("compiled"):
        return "data" if not child.first(r"\d+ steps of") else "compilation"
    if child.first("trained "):
        return "export"
    if next(place.output.glob("checkpoints/*tmp*"), None):
        return "save"
    last = re.match(r"step (\d+)/", lines[-1])
    if last and int(last[1]) % place.bench.run.eval_freq == 0:
        return "evaluation"
    return "steps" if child.last_step() else "restoring"


def signals(bench: Bench, row: Row, number: signal.Signals, times: int) -> None:
    """Send a signal at random moments of runs that are started again until they are complete."""
    kinds = [kind for kind in AIMS if number == signal.SIGKILL or kind != "start"]
    weights = [AIMS[kind] for kind in kinds]
    while row.tried < times:
        with row.series(bench) as place:
            newest, status = 0, None
            while status != 0:
                kind = bench.rng.choices(kinds, weights)[0]
                with place.start() as child:
                    if row.tried < times:
                        if number == signal.SIGTERM:
                            child.seen("pad token")  # before, Python may not have come to the handler
                        await_moment(bench, child, kind, newest)
                        child.send(number)
                    status = child.wait()
                    done = child.first("exported to") is not None
                if child.last_step() or child.first("trained"):
                    expect(child.resumed() == newest, f"went on from {child.resumed()}, though {newest} was complete")
                    row.recovered(child)
                if status == 0:
                    break
                newest = place.newest()
                reached = max(child.last_step(), newest)
                row.count(phase(place, child), f"status {status} at step {reached}, complete: {newest}")
                row.lost(reached, newest, bench.run.save_freq)
                if number == signal.SIGTERM:
                    # After the export nothing is left to be handled.
                    expect(status == RESUMABLE or (done and status == -number), f"SIGTERM: exit status {status}")
                    expect(reached == newest, f"SIGTERM: step {reached} was taken, but only {newest} is saved")
                else:
                    expect(status == -number, f"exit status {status}")
            place.check_result()


def lost_processes(bench: Bench, row: Row, times: int) -> None:
    """Kill one of two processes, in turns: the other one says so and ends, and both go on when started again."""
    cache = bench.folder / "cache_of_two"

    @contextlib.contextmanager
    def two(place: Place) -> Iterator[list[Child]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        who = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
        place.cache = cache
        with (
            place.start(devices=2, JAX_PROCESS_ID="0", **who) as a,
            place.start(devices=2, JAX_PROCESS_ID="1", **who) as b,
        ):
            yield [a, b]

    def complete(children: list[Child]) -> None:
        statuses = [child.wait() for child in children]
        expect(statuses == [0, 0], f"exit statuses {statuses} of two processes")

    expected = None
    while row.tried < times:
        with row.series(bench) as place:
            if expected is None:
                with two(place) as children:
                    complete(children)
                expected = place.result()
                shutil.rmtree(place.output)
            index, step = row.tried % 2, bench.rng.randrange(1, bench.run.steps - 10)
            with two(place) as children:
                expect(children[0].seen(f"step {step}/"), f"step {step} was not reached")
                children[index].send(signal.SIGKILL)
                other = children[1 - index]
                reached = children[0].last_step()
                expect(other.ended_within(PEER_SECONDS), f"the other process still runs after {PEER_SECONDS} s")
            newest, said = (
                place.newest(),
                other.first(f"easyrm: process {1 - index} of 2 (also )?lost process {index}.*"),
            )
            row.count(f"process {index}", f"the other one ended with {other.wait()}: {said and said[0]}")
            expect(said, "the other one did not say why it ended")
            row.lost(reached, newest, bench.run.save_freq)
            with two(place) as children:
                complete(children)
            expect(children[0].resumed() == newest, f"went on from {children[0].resumed()}, not from {newest}")
            row.recovered(children[0])
            place.check_result(expected)


def full_disks(bench: Bench, row: Row, times: int) -> None:
    """Fill the disk in the middle of a run, in turns: for a while, and until the run has ended."""
    while row.tried < times:
        with row.series(bench) as place, small_disk(place.output) as disk:
            ends, spare = row.tried % 2 == 1, 0 if row.tried % 4 > 1 else SPARE
            step = bench.rng.randrange(1, bench.run.steps // 2)
            with place.start() as child:
                child.seen(f"step {step}/")
                disk.fill(child.pid, spare)
                said = child.seen(r"warning: the checkpoint of step \d+ was not written \(.*\)", 120)
                moment = f"{'to the end' if ends else 'for a while'}, {spare // 1024} KiB left"
                row.count(moment, f"from step {step} on, said: {bool(said)}")
                expect(said, "no save that failed was named")
                if not ends:
                    disk.free(child.pid)
                status = child.wait()
                disk.free(child.pid)
                if ends:
                    failed = child.first(r"easyrm: .*free space")
                    expect(status == BAD_INPUT and failed, f"ended with {status} and said nothing of space")
                    row.lost(0, place.newest(), bench.run.save_freq)
                    place.finish(row, place.newest())
                else:
                    expect(status == 0, f"ended with status {status} after space was freed")
                    place.check_result()


def prepared(bench: Bench, place: Place) -> int:
    """Have a run in `place` killed when it has saved twice and more; its newest complete checkpoint."""
    step = bench.rng.randrange(3 * bench.run.save_freq, bench.run.steps)
    with place.start() as child:
        expect(child.seen(f"step {step}/"), f"step {step} was not reached")
    return place.newest()


def damaged_checkpoints(bench: Bench, row: Row, times: int) -> None:
    """Damage a random file of the newest checkpoint: it is named and set aside, unless nothing reads that file."""
    while row.tried < times:
        with row.series(bench) as place:
            newest = prepared(bench, place)
            folder = place.output / "checkpoints" / str(newest)
            file = bench.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
            kind, data = DAMAGES[row.tried % len(DAMAGES)], bytearray(file.read_bytes())
            at = bench.rng.randrange(len(data))
            if kind == "removed":
                file.unlink()
            elif kind == "cut":
                file.write_bytes(data[:at])
            else:
                data[at] ^= 1 << bench.rng.randrange(8)
                file.write_bytes(data)
            child = place.finish(row)
            named = child.first(f"warning: the checkpoint of step {newest} is damaged")
            went_on = child.resumed()
            row.count(kind, f"{file.relative_to(folder)} of {newest}: named: {bool(named)}, went on from {went_on}")
            expect(went_on == (newest - bench.run.save_freq if named else newest), f"went on from {went_on}")
            row.lost(newest, went_on, bench.run.save_freq)


def changed_data(bench: Bench, row: Row, times: int) -> None:
    """Remove or cut the training data before a restart: refused by name, and exact when it is back."""
    file = bench.run.train
    data = file.read_bytes()
    while row.tried < times:
        with row.series(bench) as place:
            newest = prepared(bench, place)
            kind = ("removed", "cut")[row.tried % 2]
            try:
                file.unlink() if kind == "removed" else file.write_bytes(data[: bench.rng.randrange(len(data))])
                with place.start() as child:
                    status = child.wait()
            finally:
                file.write_bytes(data)
            refusal = child.lines[-1][1] if child.lines else ""
            row.count(kind, f"status {status}: {refusal}")
            expect(status == BAD_INPUT and refusal.startswith("easyrm: "), f"ended with status {status}: {refusal}")
            expect(file.name in refusal, f"the refusal does not name {file.name}: {refusal}")
            place.finish(row, newest)


def table(rows: list[Row], save_freq: int) -> None:
    """Print the rows."""
    head = ("fault", "tried", "survived", f"steps repeated (save interval {save_freq})", "seconds to recover")
    lines = [head, *(row.cells() for row in rows if row.tried)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for name, *cells in lines:
        rest = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print(f"{name:<{widths[0]}}  {'  '.join(rest)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs at random moments")
    parser.add_argument("--others", type=int, default=4, help="tries of each other fault")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    parser.add_argument("--output", type=Path, help="a folder that is not there yet; a temporary one by default")
    args = parser.parse_args()
    if args.output and args.output.exists():
        sys.exit(f"error: --output={args.output} is there already; name another folder")
    folder = (args.output or Path(tempfile.mkdtemp(prefix="easyrm-faults-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, in {folder}", flush=True)

    bench = Bench(folder, args.seed)
    print(f"without a fault: {bench.seconds['end']:.1f} s for {bench.run.steps} steps", flush=True)
    kills, terms = Row("SIGKILL"), Row("SIGTERM")
    signals(bench, kills, signal.SIGKILL, args.kills)
    signals(bench, terms, signal.SIGTERM, args.terms)
    rows = [kills, terms]
    others = {
        "one of two processes killed": lost_processes,
        "disk full": full_disks,
        "newest checkpoint damaged": damaged_checkpoints,
        "training data changed": changed_data,
    }
    for name, make in others.items():
        rows.append(Row(name))
        make(bench, rows[-1], args.others)

    print()
    table(rows, bench.run.save_freq)
    problems = [problem for row in rows for problem in row.problems]
    result = {"seed": args.seed, "steps": bench.run.steps, "save_freq": bench.run.save_freq, "problems": problems}
    keys = ("tried", "survived", "repeated", "seconds", "moments")
    result |= {row.fault: {key: getattr(row, key) for key in keys} for row in rows if row.tried}
    print(json.dumps(result))
    if problems:
        sys.exit(1)
    if not args.output:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
