"""The command of the doctor: its flags, its course, and what each process prints."""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from absl import flags

from easyrm.config import RunConfig
from easyrm.errors import InputError
from easyrm.files import flatten
from easyrm.flags import define_run_flags, run_command, run_config
from easyrm.health import table, versions
from easyrm.health.examination import Examination, Found, healthy
from easyrm.health.finding import FAIL, OK, WARN, Check, Finding
from easyrm.health.following import follow
from easyrm.health.leading import lead
from easyrm.health.local import Local
from easyrm.health.place import Place, expected_devices, find_place
from easyrm.health.storage import Probes
from easyrm.health.trial import Trial
from easyrm.redact import redact_tree

_DETECTION = 15.0  # seconds for JAX's detection of a cluster, which asks a metadata server


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked beside the run's own flags."""

    devices: int
    wait: float
    json: bool


def define_doctor_flags() -> None:
    """Register the run's flags and those of the doctor."""
    define_run_flags()
    flags.DEFINE_integer("devices", 0, "devices expected on all hosts together (0: what the accelerator's type says)")
    flags.DEFINE_float("wait", 40.0, "seconds to wait for the other hosts")
    flags.DEFINE_bool("json", False, "print one JSON object and nothing else")
    for name in ("devices", "wait", "json"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows it


def requested(values: flags.FlagValues) -> Request:
    """The doctor's own flags. Raises InputError for values out of range."""
    request = Request(**{field.name: values[field.name].value for field in dataclasses.fields(Request)})
    if request.devices < 0:
        raise InputError(f"--devices={request.devices}: choose 1 or more, or 0 for what the accelerator's type says")
    if not 0 < request.wait < float("inf"):
        raise InputError(f"--wait={request.wait}: choose a number of seconds above 0")
    return request


def examine(config: RunConfig, request: Request, began: float) -> bool:
    """Look at everything, with all other hosts, and print it; whether all is healthy.

    Process 0 prints the table of all hosts, the others what is theirs alone.
    """
    place, expected, found = whereabouts(config, request)
    probes, trial, facts = Probes(), Trial(), versions.here()
    try:
        exam = Examination(
            place=place,
            host=socket.gethostname(),
            facts=facts,
            settings={name: str(value) for name, value in flatten(redact_tree(config.to_dict())).items()},
            output_dir=config.output_dir,
            asked={"distributed": config.distributed if place.coordinator else "false", "mesh_dim": config.mesh_dim}
            | dict(zip(("expected", "source"), expected, strict=True)),
            local=Local(config, place.count, facts, probes),
            probes=probes,
            trial=trial,
            began=began,
            wait=request.wait,
            before=found,
        )
        if place.index == 0:
            found, names = lead(exam)
            show(found, exam, request, names)
            return healthy(found)
        found, verdict = follow(exam)
        show_own(found, exam, request, verdict)
        return healthy(found) and verdict is not False
    finally:
        trial.end()
        probes.remove()


def whereabouts(config: RunConfig, request: Request) -> tuple[Place, tuple[int, str], Found]:
    """Which process this is, how many devices there should be and who says so, and what went wrong with that."""
    known: list = [Place(), (request.devices, f"--devices={request.devices}" if request.devices else "")]

    def place() -> Finding:
        known[0] = find_place(config.distributed)
        return Finding("hosts", OK, "")

    def devices() -> Finding:
        known[1] = expected_devices(request.devices)
        return Finding("devices", OK, "")

    checks = [Check("hosts", _DETECTION, place), Check("devices", _DETECTION, devices)]
    found = [(known[0].index, finding) for check in checks for finding in check.findings() if finding.state == FAIL]
    return known[0], known[1], found


def show(found: Found, exam: Examination, request: Request, names: dict[int, str]) -> None:
    """The table of all hosts, as process 0 prints it."""
    rows = table.merge(found)
    seconds = time.monotonic() - exam.began
    if request.json:
        names = {str(index): name for index, name in sorted(names.items())}
        print_json(healthy(found), exam, rows, hosts=names)
        return
    print(table.as_text(rows, exam.place.count))
    troubled = sorted({host for row in rows if row.finding.state in (FAIL, WARN) for host in row.hosts})
    if exam.place.count > 1 and troubled:
        print("hosts: " + ", ".join(f"{host} is {names.get(host) or 'unknown'}" for host in troubled[:8]))
    print(f"{'healthy' if healthy(found) else 'not healthy'}: {table.summary(rows)}, in {seconds:.0f} s")


def show_own(found: Found, exam: Examination, request: Request, verdict: bool | None) -> None:
    """What another process prints: its own troubles, and where to look for the rest."""
    rows = table.merge(found)
    if request.json:
        print_json(healthy(found) and verdict is not False, exam, rows, hosts={str(exam.place.index): exam.host})
        return
    if verdict is not None:
        rows = [row for row in rows if row.finding.state in (FAIL, WARN)]
    if rows:
        print(table.as_text(rows, 1))
    mine = f"process {exam.place.index} of {exam.place.count} ({exam.host})"
    where = exam.place.name_of(0)
    if verdict is None:
        print(f"{mine}: not healthy: {table.summary(rows)}; process 0 is not there to tell of the others")
    else:
        state = "all hosts are healthy" if verdict else "not all hosts are healthy"
        print(f"{mine}: {'the lines above are' if rows else 'nothing is'} its own; {state}: {where} prints the table")


def print_json(all_well: bool, exam: Examination, rows: list[table.Row], hosts: dict[str, str]) -> None:
    """One object on stdout."""
    place = exam.place
    seconds = round(time.monotonic() - exam.began, 1)
    head = {"healthy": all_well, "process": place.index, "processes": place.count, "coordinator": place.coordinator}
    print(json.dumps({**head, "hosts": hosts, "seconds": seconds, "checks": table.as_dict(rows)}))


def run() -> None:
    """Flags in, a table out; exit status 0 where all is healthy, else 2."""
    began = time.monotonic()

    def doctor() -> NoReturn:
        request = requested(flags.FLAGS)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that files are removed
        try:
            status = 0 if examine(run_config(), request, began) else 2
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a check that hangs does not keep the process

    run_command(doctor, define_doctor_flags)
