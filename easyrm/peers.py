"""What the processes of one run know of each other: who lives, who failed, and why this one has to end.

JAX's coordination service, which lives in process 0, carries it all: its key-value store has what each process says,
its heartbeats notice who says nothing more. Where a heartbeat is missed, JAX aborts all other processes from a C++
thread; the handler of SIGABRT below is the one place from which that can still be explained.
"""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from jax._src.distributed import global_state  # the key-value store has no public name
from jax.errors import JaxRuntimeError

from easyrm.errors import HostMissing, InputError
from easyrm.ports import unreachable
from easyrm.redact import redact

HEARTBEAT = 30  # seconds of silence after which JAX calls a process lost
NOTE = 60.0  # seconds of waiting for another process after which a line says for which
LINGER = 10.0  # seconds that a process that fails gives the others to read why
LAST = 2.0  # seconds by which process 0, with which the store goes, outlives them
_GRACE = {"failed": 1.0, "ended": 30.0}  # seconds in which this process may come to the same end by itself
PEER_LOST = HostMissing.STATUS  # exit status of a process that ends because of another

_here: "Peers | None" = None


class Peers:
    """The processes of this run, seen from this one. `join` once JAX's runtime is up, `finish` or `fail` at the end."""

    def __init__(self):
        self._joined = False
        self._beats: dict[int, tuple[str, float]] = {}  # each process's last beat, and when it was first seen
        self._ends: dict[int, tuple[str, int, str]] = {}  # how processes ended: kind, exit status, reason
        self._read = 0.0  # when the store last answered
        self._finished = threading.Event()
        self._ending = threading.Lock()  # held for ever by the thread that ends this process
        self._status = 1
        self._exchanges = itertools.count()

    @property
    def index(self) -> int:
        """Which process this is, from 0."""
        return global_state.process_id

    @property
    def count(self) -> int:
        """How many processes the run has."""
        return global_state.num_processes

    @property
    def name(self) -> str:
        """This process in messages: process 1 of 2."""
        return f"process {self.index} of {self.count}"

    def join(self) -> None:
        """From now on end this process, with a message, when another one fails."""
        self._joined, self._read = True, time.monotonic()
        threading.Thread(target=self._watch, name="easyrm-peers", daemon=True).start()

    def exchange(self, value: str, what: str) -> list[str]:
        """Every process's value, by index. Every process calls it, as often as every other; waits for the last."""
        folder = f"easyrm/exchange/{next(self._exchanges)}/"
        global_state.client.key_value_set(f"{folder}{self.index}", value)
        note = time.monotonic() + NOTE
        while len(values := dict(global_state.client.key_value_dir_get(folder))) < self.count:
            if time.monotonic() > note:
                missing = [str(i) for i in range(self.count) if f"{folder}{i}" not in values]
                _say(f"{self.name} waits for process {', '.join(missing)} ({what})")
                note = float("inf")
            time.sleep(0.25)
        return [values[f"{folder}{i}"] for i in range(self.count)]

    def finish(self) -> None:
        """Wait until every process is done, while the end of another one still ends this one; then exit as usual."""
        self._tell("end", json.dumps(["done", 0, ""]))
        while sum(kind == "done" for kind, _, _ in self._ends.values()) < self.count:
            time.sleep(0.25)
            self._look()
        self._finished.set()

    def fail(self, error: BaseException, report: Callable[[BaseException], int]) -> None:
        """End this process with the status that `report` returns, when the others had time to read why."""
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * LINGER)  # another thread has begun to end the process
        try:
            if self._joined and self._comes_of_a_peer(error):
                if ends := self._early_ends():
                    self._stop_after(ends)
                    return
                if lost := self._lost():  # may have beaten again since
                    _say(f"{self.name} lost {lost}; stopping ({' '.join(str(error).split())[:200]})")
                    self._status = PEER_LOST
                    if not lost.startswith("process 0,"):  # else there is no one left to tell
                        self._tell("end", json.dumps(["failed", PEER_LOST, f"it lost {lost}"]))
                        self._linger(LINGER)
                    return
            self._status = report(error)
            if self._joined:
                kind = "ended" if isinstance(error, SystemExit) else "failed"
                name = "" if isinstance(error, InputError | SystemExit) else f"{type(error).__name__}: "
                self._tell(
                    "end", json.dumps([kind, self._status, " ".join(f"{name}{error}".split())[:500].rstrip(": ")])
                )
                self._linger(LINGER + _GRACE[kind])
        finally:
            _exit(self._status)

    def aborted(self) -> None:
        """Say why JAX aborts this process, and end it; returns where no other process is the reason."""
        first = self._ending.acquire(blocking=False)
        if not first:
            time.sleep(LINGER / 2)  # for the thread that ends the process to say why
        elif not self._joined:
            _say(
                f"{self.name}: the coordinator at {global_state.coordinator_address} refused this process (JAX says "
                "why above); give all processes the same JAX_NUM_PROCESSES and each its own JAX_PROCESS_ID, and see "
                "that no older run holds the port"
            )
            _exit(2)
        if self._status != PEER_LOST and (lost := self._lost()):  # else it is said
            _say(f"{self.name} lost {lost}; stopping")
            _exit(PEER_LOST if first else self._status)
        if not first:
            _exit(self._status)
        _say(f"{self.name} was aborted, JAX says why above")

    def _watch(self) -> None:
        period = min(5.0, max(1.0, self.count / 64))  # a large pod asks process 0 less often
        since = None
        for beat in itertools.count():
            self._tell("beat", str(beat))
            self._look()
            ends = self._early_ends()
            since = since or (time.monotonic() if ends else None)
            due = ends and time.monotonic() >= since + min(_GRACE[kind] for kind, _, _ in ends.values())
            if due and self._ending.acquire(blocking=False):
                self._stop_after(ends)
                _exit(self._status)
            # One that is ending beats and looks on: else it would take the others for lost, and they it.
            if self._finished.wait(period):
                return

    def _early_ends(self) -> dict[int, tuple[str, int, str]]:
        """The processes that ended the run, by index."""
        return {i: end for i, end in sorted(self._ends.items()) if end[0] in _GRACE}

    def _stop_after(self, ends: dict[int, tuple[str, int, str]]) -> None:
        why = "; ".join(f"process {i} of {self.count} {kind}: {why}" for i, (kind, _, why) in ends.items())
        _say(f"{why}; stopping")
        # A stop from which the same command resumes is one for every process; a failure is of its process alone.
        failed = any(kind == "failed" for kind, _, _ in ends.values())
        self._status = PEER_LOST if failed else max(status for _, status, _ in ends.values())
        self._tell("end", json.dumps(["followed", self._status, ""]))
        if self.index == 0:
            self._linger(LINGER)

    def _tell(self, what: str, value: str) -> None:
        # Where process 0 is gone there is no one to tell, and JAX aborts this process.
        with contextlib.suppress(RuntimeError):
            global_state.client.key_value_set(f"easyrm/state/{self.index}/{what}", value, allow_overwrite=True)

    def _look(self) -> None:
        with contextlib.suppress(RuntimeError):
            ends, beats, now = {}, {}, time.monotonic()
            for key, value in global_state.client.key_value_dir_get("easyrm/state/"):
                index, what = key.split("/")[-2:]
                if what == "end":
                    ends[int(index)] = tuple(json.loads(value))
                else:
                    before = self._beats.get(int(index))
                    beats[int(index)] = before if before and before[0] == value else (value, now)
            # Replaced, not changed: another thread may be walking through them.
            self._ends, self._beats, self._read = ends, beats, now

    def _linger(self, longest: float) -> None:
        # Until every other process has ended or failed by itself; process 0 goes last, for the store goes with it.
        until = time.monotonic() + longest
        while sum(kind != "done" for kind, _, _ in self._ends.values()) < self.count and time.monotonic() < until:
            time.sleep(0.25)
            self._look()
        if self.index == 0:
            time.sleep(LAST)

    def _comes_of_a_peer(self, error: BaseException) -> bool:
        """Whether another process is the reason: it has said that it ends, or its beats stay away."""
        until = time.monotonic() + HEARTBEAT / 2
        suspect = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        while suspect and time.monotonic() < until and not (self._lost() or self._early_ends()):
            time.sleep(0.25)  # a collective fails at once where a peer is gone
        return suspect and bool(self._lost() or self._early_ends())

    def _lost(self) -> str:
        now, stale, address = time.monotonic(), HEARTBEAT / 3, global_state.coordinator_address
        if self.index and (now - self._read > stale or unreachable(address)):
            return f"process 0, the coordinator at {address}: it ended or does not answer"
        silent = {i: now - at for i, (_, at) in self._beats.items() if i not in self._ends and now - at > stale}
        silent.pop(self.index, None)
        return ", ".join(f"process {i}, silent for {silent[i]:.0f} s" for i in sorted(silent))


def here() -> Peers | None:
    """The processes of this run; None where there is but one."""
    return _here


def prefix() -> str:
    """What an error message of this process begins with: "process 1 of 2: ", or nothing where it is alone."""
    return f"{_here.name}: " if _here else ""


def enter() -> Peers:
    """Begin to explain JAX's aborts: several processes are about to meet."""
    global _here
    _here = Peers()
    _signal(signal.SIGABRT, _ON_ABORT)
    return _here


def leave() -> None:
    """Undo `enter`: this process is alone."""
    global _here
    _here = None
    _signal(signal.SIGABRT, None)


def _say(line: str) -> None:
    # Not print: the thread that JAX interrupted may hold sys.stderr.
    with contextlib.suppress(OSError):
        os.write(2, redact(f"easyrm: {line}\n").encode())


def _exit(status: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


# Python's own handlers run in the main thread, after abort() has ended the process; JAX's hook for missed heartbeats
# cannot be called from Python (it passes an absl::Status). A C handler can: abort() waits for it to return.
_ON_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _here.aborted() if _here else None)
_signal = ctypes.CDLL(None).signal
