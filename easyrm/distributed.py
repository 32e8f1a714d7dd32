"""One program on many hosts: they start together, and end together."""

import contextlib
import glob
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
from jax._src.distributed import global_state

from easyrm import peers, ports
from easyrm.errors import TOLD, HostMissing, InputError, Unavailable, one_line
from easyrm.redact import redact

_NEVER = 10**6  # seconds: JAX aborts the process at its own timeout, so ours comes first


def start_distributed(mode: str, timeout: float = 300) -> None:
    """Call jax.distributed.initialize where `mode` ("auto", "true", "false") and the machine ask for it.

    "auto" does where JAX_COORDINATOR_ADDRESS is set or a TPU is attached; on a TPU pod JAX finds the other hosts by
    itself. Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who. Must run before
    anything touches a device. With several processes, each then watches the others (see `together`), and all but
    process 0 log warnings only. Raises InputError for a malformed environment, HostMissing where the processes have not
    met after `timeout` seconds, and Unavailable where what says which hosts there are does not answer.
    """
    if jax.distributed.is_initialized() or not asked_for(mode):
        return
    explicit = who_is_who(os.environ) if os.environ.get("JAX_COORDINATOR_ADDRESS") else None
    if explicit and explicit[2] == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(*explicit[:2])
    run = peers.enter()
    problem = _initialize(explicit or (), timeout)
    if isinstance(problem, TimeoutError) and global_state.client is not None:
        raise HostMissing(_not_met(run, timeout)) from problem
    if problem is not None:
        if global_state.client is None:
            peers.leave()
        if isinstance(problem, OSError):  # a TPU VM's metadata server, for instance, soon after a boot
            raise Unavailable(f"JAX's distributed runtime does not start yet ({one_line(problem)})") from problem
        reason = " ".join(str(problem).split()) or f"no coordinator found in {timeout:g} s"
        raise InputError(
            f"JAX's distributed runtime does not start ({reason}): set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host, or give --distributed=false for one host alone"
        ) from problem
    if run.count == 1:
        peers.leave()
        return
    run.join()
    if run.index > 0:
        logging.disable(logging.INFO)
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def asked_for(mode: str) -> bool:
    """Whether `mode` ("auto", "true", "false") and the machine ask for JAX's distributed runtime."""
    return mode == "true" or (mode == "auto" and bool(os.environ.get("JAX_COORDINATOR_ADDRESS") or tpu_chips()))


def tpu_chips() -> list[str]:
    """The device files of this host's TPU chips; none where JAX is told to compute on the processor."""
    return [] if on_cpu() else sorted(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


def on_cpu() -> bool:
    """Whether the first of JAX_PLATFORMS, on which JAX computes, is the processor."""
    return os.environ.get("JAX_PLATFORMS", "").partition(",")[0] == "cpu"


def say(line: str) -> None:
    """Print a line, without secrets, on process 0, and a warning on any. A log on a full disk ends no run."""
    with contextlib.suppress(OSError):
        if jax.process_index() == 0:
            print(redact(line), flush=True)
        elif line.startswith("warning: "):
            print(redact(f"easyrm: {peers.prefix()}{line}"), file=sys.stderr, flush=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a whole run: what ends one of several processes early ends all of them, within a minute.

    The process that raises prints its error and exits as it would alone, but without JAX's barrier at exit, which the
    others would never reach. They print "process I of N failed: REASON; stopping" and exit with peers.PEER_LOST, or,
    after SystemExit (any status but 0), with the same status. A process alone sees its exceptions unchanged.
    """
    try:
        yield
    except BaseException as error:
        run = peers.here()
        if run is None:
            raise
        if not isinstance(error, SystemExit) or error.code:
            run.fail(error, report)
        run.finish()
        peers.leave()
        raise
    if run := peers.here():
        run.finish()
        peers.leave()


def report(error: BaseException) -> int:
    """Print on stderr what ended this process, one line or a traceback, and return the exit status."""
    if isinstance(error, TOLD):
        print(redact(f"easyrm: {peers.prefix()}{error}"), file=sys.stderr)
        return getattr(error, "STATUS", 2)
    if isinstance(error, KeyboardInterrupt):
        print(f"easyrm: {peers.prefix()}interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    print(f"easyrm: {peers.prefix()}failed", file=sys.stderr)
    print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    return 1


def who_is_who(environment: dict[str, str]) -> tuple[str, int, int] | None:
    """(coordinator's address, number of processes, index of this one); None where JAX_NUM_PROCESSES is unset.

    Raises InputError for what cannot be a run. Only a process alone may leave JAX_PROCESS_ID out.
    """
    address = environment["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"JAX_COORDINATOR_ADDRESS={address}: give HOST:PORT, with process 0's host and a free port")
    if "JAX_NUM_PROCESSES" not in environment:
        return None
    count, index = environment["JAX_NUM_PROCESSES"], environment.get("JAX_PROCESS_ID")
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"JAX_NUM_PROCESSES={count}: give the number of processes, 1 or more")
    if index is None and int(count) > 1:
        raise InputError(f"JAX_PROCESS_ID is not set: give each of the {count} processes its own, from 0")
    if index is not None and (not index.isdecimal() or int(index) >= int(count)):
        raise InputError(
            f"JAX_PROCESS_ID={index}: give a number from 0 to {int(count) - 1}, as JAX_NUM_PROCESSES={count}"
        )
    return address, int(count), int(index or 0)


def _initialize(explicit: tuple, timeout: float) -> Exception | None:
    """Start JAX's runtime; the exception that it raised, or TimeoutError while it still waits, in a thread."""
    problem: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                *explicit, initialization_timeout=_NEVER, heartbeat_timeout_seconds=peers.HEARTBEAT
            )
        except Exception as error:
            problem.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    return TimeoutError() if thread.is_alive() else next(iter(problem), None)


def _check_port(address: str, count: int) -> None:
    # JAX's own attempt may crash the process, and gRPC, with SO_REUSEPORT, may share the port with an older run.
    try:
        ports.bound_socket(address).close()
    except OSError as error:
        raise InputError(
            f"process 0 of {count} cannot listen on the port of JAX_COORDINATOR_ADDRESS={address} "
            f"({error.strerror}): end the program that holds it, or choose another port on every host"
        ) from error


def _not_met(run: peers.Peers, timeout: float) -> str:
    address, longer = global_state.coordinator_address, "--distributed_timeout=SECONDS waits longer"
    if run.index > 0 and (reason := ports.unreachable(address)):
        return (
            f"waited {timeout:g} s for the coordinator at {address}, which cannot be reached ({reason}): "
            f"check that process 0 runs there, that every host has this address, and that no firewall is between; "
            f"{longer}"
        )
    where = (
        f"as the coordinator at {address}" if run.index == 0 else f"with the coordinator at {address}, which answers"
    )
    return (
        f"waited {timeout:g} s {where}, but not all {run.count} processes came: check on every other host "
        f"that the command runs, with JAX_NUM_PROCESSES={run.count}, this address and a process id of its own; {longer}"
    )
