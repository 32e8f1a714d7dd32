"""An examination as every process but 0 sees it."""

import dataclasses
import time
from typing import Any

from easyrm.health.examination import LOOK, SLACK, Examination, Found
from easyrm.health.finding import FAIL, OK, Finding
from easyrm.health.meeting import STRANGER, Connection, Refused, Visit
from easyrm.health.processes import why
from easyrm.health.storage import sees
from easyrm.health.trial import not_tried
from easyrm.redact import redact_tree


def follow(exam: Examination) -> tuple[Found, bool | None]:
    """This process's own findings, and whether process 0 found all well; None where that is not known."""
    place = exam.place
    hello = {"index": place.index, "count": place.count, "host": exam.host}
    visit = Visit(place, {**hello, "facts": exam.facts, "settings": exam.settings}, exam.began + exam.wait)
    found = exam.own()
    try:
        return found, _answer(exam, visit.join(), found)
    except Refused as refused:
        problem = Finding(
            "coordinator",
            FAIL,
            f"process 0 at {place.coordinator} refuses this process: {refused}",
            "give all hosts the same JAX_NUM_PROCESSES, and each a JAX_PROCESS_ID of its own, from 0",
        )
    except ConnectionRefusedError as error:
        way_out = (
            f"see that the command runs as {place.name_of(0)} at the same time, that this address leads there, and "
            "that no firewall is between"
        )
        if str(error) == STRANGER:
            way_out = "end that program, or choose another port in JAX_COORDINATOR_ADDRESS on every host"
        text = f"cannot reach {place.coordinator} ({error}), tried for {time.monotonic() - exam.began:.0f} s"
        problem = Finding("coordinator", FAIL, text, way_out)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = why(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        problem = Finding(
            "coordinator", FAIL, f"process 0 at {place.coordinator} was lost: {reason}", "see what process 0 says"
        )
    tried = any(finding.check == "devices" for _, finding in found)
    return [*found, *exam.mine([problem] if tried else [problem, not_tried("process 0 is missing")])], None


def _answer(exam: Examination, connection: Connection, found: Found) -> bool:
    """Tell process 0 what is found here, and hear from it what it finds of this one; `found` grows by both.

    Whether process 0 calls all hosts healthy.
    """
    message = connection.receive(time.monotonic() + max(exam.wait, LOOK) + SLACK)
    seen = sees(message["look"]) if message["look"] else None
    reached = Finding("coordinator", OK, f"{exam.place.coordinator} is reached")
    own = [reached, *(finding for _, finding in found)]
    connection.send({"findings": _plain(own), "sees": seen})
    message = connection.receive(time.monotonic() + LOOK + SLACK)
    seconds = float(message["seconds"])
    devices = exam.try_devices(message["obstacle"], seconds)
    found += exam.mine(devices)
    connection.send({"findings": _plain(devices), "rates": exam.trial.rates})
    message = connection.receive(time.monotonic() + seconds + 2 * SLACK)
    found += [(host, Finding.of(values)) for host, values in message["compared"] if host == exam.place.index]
    return bool(message["healthy"])


def _plain(findings: list[Finding]) -> list[dict[str, Any]]:
    # The secrets of this host's environment are not known to process 0, which prints them.
    return redact_tree([dataclasses.asdict(finding) for finding in findings])
