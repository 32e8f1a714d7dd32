"""The trial of the devices, in a process that can be ended: what it found, and what it was doing where it failed."""

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from easyrm.health.finding import FAIL, SKIPPED, Finding

CHECKS = ("devices", "mesh", "matmul", "all-reduce")
_FAREWELL = 5.0  # seconds to leave JAX's runtime in good order
_ENDED = "mend what it says; where it lost another process, that one's line says why"
_WAY_OUT = {
    "devices": "see what failed on other hosts, for which this one waits; that no other process uses the devices; and "
    "that no firewall is between the hosts",
    "mesh": "report this: it takes no time",
    "matmul": "see what else uses the devices",
    "all-reduce": "see that every host got here, and that hosts reach each other on all ports",
}


class Trial:
    """`findings` and `rates` ({device: TFLOP/s}, of accelerators) of this host's part of the trial."""

    def __init__(self, program: Sequence[str] = (sys.executable, "-m", "easyrm.health.devices")):
        self._program = program
        self.findings: list[Finding] = []
        self.rates: dict[str, float] = {}
        self._process: subprocess.Popen | None = None

    def run(self, asked: dict[str, Any], seconds: float) -> None:
        """Start it, tell it what is `asked`, and listen for at most so many seconds."""
        try:
            with tempfile.TemporaryFile() as errors:
                self._process = subprocess.Popen(
                    self._program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
                self._listen({**asked, "seconds": seconds}, time.monotonic() + seconds, errors)
        except OSError as error:  # no room for a file, or for a process
            self._failed(CHECKS[0], f"its process cannot be started ({error})")
        finally:
            self.end()

    def end(self) -> None:
        """End the process, if it has not ended by itself; one that a driver holds in the kernel cannot be ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._farewell()

    def _farewell(self) -> int | None:
        """The process's exit status; None where it does not end soon."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_FAREWELL)
        return None

    def _listen(self, asked: dict[str, Any], until: float, errors) -> None:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        current, began = CHECKS[0], time.monotonic()
        try:
            self._process.stdin.write(json.dumps(asked))
            self._process.stdin.close()
            while line := lines.get(timeout=max(0.1, until - time.monotonic())):
                message = json.loads(line)
                current = message.get("begins", current)
                self.rates = message.get("rates", self.rates)
                if "finding" in message:
                    self.findings.append(Finding.of(message["finding"]))
                if message.get("done"):
                    self._farewell()  # all is found, even if its end hangs
                    return
            status = self._farewell()
            ended = "fell silent" if status is None else f"ended with status {status}"
            self._failed(current, f"its process {ended}: {_last_line(errors)}", _ENDED)
        except queue.Empty:
            self._failed(current, f"no answer within {time.monotonic() - began:.0f} s")
        except (OSError, ValueError, TypeError) as error:  # ended, or what it prints is no line of ours
            self._failed(current, f"its process cannot be reached ({error}): {_last_line(errors)}")

    def _read(self, lines: "queue.Queue[str]") -> None:
        for line in self._process.stdout:
            lines.put(line)
        lines.put("")

    def _failed(self, current: str, reason: str, way_out: str = "") -> None:
        done = {finding.check for finding in self.findings}
        self.findings.append(Finding(current, FAIL, reason, way_out or _WAY_OUT[current]))
        reason = f"not tried, since {current} failed"
        self.findings += [Finding(check, SKIPPED, reason) for check in CHECKS if check not in done | {current}]


def not_tried(reason: str) -> Finding:
    """One line for a whole trial that was not made."""
    return Finding(CHECKS[0], SKIPPED, f"not tried, nor {', '.join(CHECKS[1:])}: {reason}")


def _last_line(errors) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("easyrm: ")] or lines
    return said[-1].strip()[:400] if said else "it said nothing"
