"""What a check found, and the thread with a time limit in which a check runs."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from easyrm.errors import InputError, Unavailable

OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "skipped"
_SILENT = "see that this host reaches the disk, mount, bucket or server, and may use it (gs://: has credentials)"
_DEFECT = "this is a defect of the check itself: report it, and look at what it names by hand"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table: the check, its state, what was found and, for a failure, the way out.

    `found` names measured `figures` as {name}: findings of several hosts that differ in these alone are one line.
    """

    check: str
    state: str
    found: str
    way_out: str = ""
    figures: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Finding":
        """The finding that another process sent as `dataclasses.asdict`. Raises TypeError, ValueError for none."""
        finding = cls(**values)
        texts = (finding.check, finding.state, finding.found, finding.way_out)
        if not all(isinstance(text, str) for text in texts) or finding.state not in (OK, WARN, FAIL, SKIPPED):
            raise ValueError("not a finding")
        figures = {name: [float(number) for number in numbers] for name, numbers in finding.figures.items()}
        return dataclasses.replace(finding, figures=figures)


class Check:
    """One check, begun at once in a thread of its own and cut off after `seconds`; `about` is what it looks at."""

    def __init__(self, name: str, seconds: float, look: Callable[[], Finding | list[Finding]], about: str = ""):
        self._name, self._seconds, self._look, self._about = name, seconds, look, about
        self._until = time.monotonic() + seconds
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, name=f"check {name}", daemon=True)
        self._thread.start()

    def findings(self) -> list[Finding]:
        """What was found, once it is; FAIL where the check raised something or did not end in time."""
        self._thread.join(max(0, self._until - time.monotonic()))
        prefix = f"{self._about}: " if self._about else ""
        text = f"{prefix}no answer within {self._seconds:g} s"
        return self._found or [Finding(self._name, FAIL, text, _SILENT)]

    def _run(self) -> None:
        try:
            found = self._look()
            self._found = found if isinstance(found, list) else [found]
        except (InputError, Unavailable) as error:
            self._found = [Finding(self._name, FAIL, str(error))]
        except Exception as error:
            self._found = [Finding(self._name, FAIL, f"the check crashed: {type(error).__name__}: {error}", _DEFECT)]


def plural(count: int, word: str) -> str:
    """ "1 device", "2 devices"."""
    return f"{count} {word}{'s' * (count != 1)}"


def host_numbers(hosts: Iterable[int]) -> str:
    """Process indices as ranges: "0-3,7"."""
    ranges: list[list[int]] = []
    for host in sorted(hosts):
        if ranges and host == ranges[-1][1] + 1:
            ranges[-1][1] = host
        else:
            ranges.append([host, host])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
