"""An examination as process 0 sees it, which asks all others; a process alone asks nobody."""

import contextlib
import dataclasses
import os
import time
from typing import Any

from easyrm.health import versions
from easyrm.health.devices import slow_devices
from easyrm.health.examination import LOOK, SLACK, Examination, Found, healthy
from easyrm.health.finding import FAIL, OK, WARN, Finding
from easyrm.health.meeting import Desk
from easyrm.health.processes import listeners, why
from easyrm.health.storage import standing

_SHOWN = 8  # missing processes that are named
_TOLD = 1000  # findings about others that all hear of


def lead(exam: Examination) -> tuple[Found, dict[int, str]]:
    """What was found on all hosts, and the names of the hosts that came, by process."""
    found: Found = []
    desk = _open_desk(exam, found)
    found += exam.own()
    if desk is None:
        obstacle = _obstacle(found)
        return found + exam.mine(exam.try_devices(obstacle, exam.seconds_left())), {0: exam.host}
    compared = _gather(exam, desk, found)
    obstacle, seconds = _obstacle(found + compared), exam.seconds_left()
    desk.tell({"obstacle": obstacle, "seconds": seconds})
    until = time.monotonic() + seconds  # where this process's part fails early, the others still wait for it
    found += exam.mine(exam.try_devices(obstacle, seconds))
    answers = desk.hear(max(until, time.monotonic()) + SLACK)
    found += _told(answers)
    compared += slow_devices({0: exam.trial.rates} | {i: message.get("rates", {}) for i, message in answers.items()})
    lost = Finding("hosts", FAIL, "came, but was lost before all was done", "see what it printed")
    compared += [(index, lost) for index in sorted(desk.lost)]
    found += compared
    theirs = [
        (host, dataclasses.asdict(finding)) for host, finding in compared if host and finding.state in (FAIL, WARN)
    ]
    desk.tell({"healthy": healthy(found), "compared": theirs[:_TOLD]})
    return found, {0: exam.host} | {index: guest["host"] for index, guest in desk.guests.items()}


def _open_desk(exam: Examination, found: Found) -> Desk | None:
    """The desk at the coordinator's address, None where there is no address or its port is taken."""
    address = exam.place.coordinator
    if not address:
        return None
    try:
        desk = Desk(exam.place)
    except OSError as error:
        holder = ", ".join(listeners(int(address.rpartition(":")[2]))) or "a process that this user cannot see"
        text = f"the port of {address} cannot be had ({why(error)}): it is held by {holder}"
        way_out = "end that process, or choose another port in JAX_COORDINATOR_ADDRESS on every host"
        found.append((0, Finding("coordinator", FAIL, text, way_out)))
        return None
    if reason := desk.unreachable():
        text = f"{address} does not lead to process 0, which is on {exam.host}: {reason}"
        way_out = "set JAX_COORDINATOR_ADDRESS to an address of process 0's host, the same on every host"
        found.append((0, Finding("coordinator", FAIL, text, way_out)))
    else:
        found.append((0, Finding("coordinator", OK, f"{address} is reached")))
    return desk


def _gather(exam: Examination, desk: Desk, found: Found) -> Found:
    """Wait for the others, add to `found` what each has found by itself, and return what a comparison shows."""
    desk.wait(exam.began + exam.wait)
    desk.close_door()
    missing = desk.missing()
    compared = _came(exam, desk, missing)
    facts = {0: exam.facts} | {index: guest["facts"] for index, guest in desk.guests.items()}
    settings = {0: exam.settings} | {index: guest["settings"] for index, guest in desk.guests.items()}
    compared += versions.differences(facts, "versions", versions.INSTALL)
    compared += versions.differences(settings, "settings", "give all hosts the same flags")
    with contextlib.ExitStack() as stack:
        shared = _make_shared(exam, stack) if desk.guests else ""
        desk.tell({"look": shared})
        answers = desk.hear(time.monotonic() + LOOK)
    found += _told(answers)
    if shared:
        compared += _shared(shared, {index: message.get("sees") for index, message in answers.items()})
    return compared


def _came(exam: Examination, desk: Desk, missing: list[int]) -> Found:
    place, count = exam.place, exam.place.count
    way_out = "give all hosts the same JAX_NUM_PROCESSES, and each a JAX_PROCESS_ID of its own, from 0"
    found = exam.mine([Finding("hosts", FAIL, text, way_out) for text in desk.strange])
    if not missing:
        text = f"{count} of {count} came" if count > 1 else "this one is alone"
        return [*found, *exam.mine([Finding("hosts", OK, text)])]
    names = ", ".join(place.name_of(index) for index in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    seconds = time.monotonic() - exam.began
    text = f"{count - len(missing)} of {count} came within {seconds:.0f} s; missing: {names}{more}"
    way_out = (
        f"see that the command runs there, with JAX_NUM_PROCESSES={count}, a JAX_PROCESS_ID of its own and this "
        f"address, and what it prints; no firewall may keep it from {place.coordinator}"
    )
    return [*found, *exam.mine([Finding("hosts", FAIL, text, way_out)])]


def _make_shared(exam: Examination, stack: contextlib.ExitStack) -> str:
    """The path of a file in a local --output_dir, for the others to look at; "" where there is none."""
    if not exam.output_dir or "://" in exam.output_dir:
        return ""
    with contextlib.suppress(OSError):  # the check of the directory says why
        return str(stack.enter_context(exam.probes.file(standing(exam.output_dir))))
    return ""


def _shared(path: str, seen: dict[int, Any]) -> Found:
    folder = os.path.dirname(path)
    blind = [index for index, there in seen.items() if not there]
    text = f"this host does not see a file that host 0 has made in {folder}: it is another directory"
    way_out = "give --output_dir a bucket (gs://...), or a network directory that all hosts mount at this path"
    if blind:
        return [(index, Finding("shared", FAIL, text, way_out)) for index in blind]
    return [(index, Finding("shared", OK, f"all hosts see the same {folder}")) for index in (0, *seen)]


def _told(answers: dict[int, dict[str, Any]]) -> Found:
    found = []
    for index, message in answers.items():
        try:
            found += [(index, Finding.of(values)) for values in message["findings"]]
        except (LookupError, TypeError, ValueError):
            found.append((index, Finding("hosts", FAIL, "its findings cannot be read", "see what it printed")))
    return found


def _obstacle(found: Found) -> str:
    """Why the devices cannot be tried; "" where nothing is known that prevents it."""
    failed = {finding.check: index for index, finding in reversed(found) if finding.state == FAIL}
    if "hosts" in failed:
        return "the processes are not all there"
    if "coordinator" in failed:
        return "the coordinator's address is no place to meet"
    if "versions" in failed:
        return f"the versions on host {failed['versions']} are not right, and JAX's runtime may crash"
    if "tpu" in failed:
        return f"the TPU of host {failed['tpu']} is not free"
    return ""
