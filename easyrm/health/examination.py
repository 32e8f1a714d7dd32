"""What one process brings to an examination, and what became of it."""

import dataclasses
import time
from typing import Any

from easyrm.errors import InputError
from easyrm.health.finding import FAIL, OK, Finding
from easyrm.health.local import Local
from easyrm.health.place import Place
from easyrm.health.storage import Probes
from easyrm.health.trial import Trial, not_tried
from easyrm.sharding import parse_mesh_dim

LOOK = 30.0  # seconds in which every host ends its own checks
SLACK = 10.0  # seconds that a message may be late
_REST = 15.0  # seconds after --wait in which the devices have to be done
_LEAST = 20.0  # seconds that the devices get where the hosts came late

Found = list[tuple[int, Finding]]  # findings with the index of the process whose they are


@dataclasses.dataclass
class Examination:
    """One process's part, begun at `began` (time.monotonic()), with `wait` seconds for the others to come.

    On all hosts `facts` and `settings` have to be the same; `asked` is what the trial of the devices is told.
    """

    place: Place
    host: str
    facts: dict[str, str]
    settings: dict[str, str]
    output_dir: str
    asked: dict[str, Any]
    local: Local
    probes: Probes
    trial: Trial
    began: float
    wait: float
    before: Found  # what was found while all this was made up

    def own(self) -> Found:
        """What this host has found by itself."""
        return [*self.before, *self.mine(self.local.findings())]

    def mine(self, findings: list[Finding]) -> Found:
        """Findings as this process's."""
        return [(self.place.index, finding) for finding in findings]

    def seconds_left(self) -> float:
        """For the devices."""
        return max(_LEAST, self.began + self.wait + _REST - time.monotonic())

    def try_devices(self, obstacle: str, seconds: float) -> list[Finding]:
        """The trial of the devices, or, where something is in its way, that it was not made."""
        if obstacle:
            return [not_tried(obstacle), *self._mesh_alone()]
        llama = self.local.llama
        heads = (llama.num_attention_heads, llama.num_key_value_heads) if llama else None
        self.trial.run({**self.asked, "heads": heads}, seconds)
        return self.trial.findings

    def _mesh_alone(self) -> list[Finding]:
        """Whether --mesh_dim fits the devices that are expected, where that is known."""
        if not self.asked["expected"]:
            return []
        try:
            sizes = parse_mesh_dim(self.asked["mesh_dim"], self.asked["expected"])
        except InputError as error:
            return [Finding("mesh", FAIL, str(error))]
        text = f"--mesh_dim={self.asked['mesh_dim']}: {', '.join(map(str, sizes))} of the devices that are expected"
        return [Finding("mesh", OK, text)]


def healthy(found: Found) -> bool:
    """Whether nothing failed."""
    return all(finding.state != FAIL for _, finding in found)
