"""Mean and standard deviation of a model's rewards on a reference file, kept in its config.json."""

import json
import math
from typing import Any, NamedTuple

from etils import epath

from easyrm.errors import InputError
from easyrm.file_digests import redo_file_digest
from easyrm.files import write_atomically
from easyrm.strict_json import read_object


class Statistics(NamedTuple):
    """Of rewards: their mean, and their standard deviation (population), which is above 0."""

    mean: float
    std: float


def read_statistics(raw: dict[str, Any], model: str) -> Statistics:
    """`reward_mean` and `reward_std` of a raw config.json. Raises InputError where they are missing or no numbers."""
    found = Statistics(raw.get("reward_mean"), raw.get("reward_std"))
    if not all(type(value) in (int, float) and math.isfinite(value) for value in found) or found.std <= 0:
        raise InputError(
            f"--normalize: {model} has reward_mean={found.mean} and reward_std={found.std} in its config.json; export "
            "it, and score a reference file with the export and --save_statistics=true first"
        )
    return found


def save_statistics(directory: epath.Path, found: Statistics, reference: str) -> None:
    """Keep `found`, of the file `reference`, in the config.json of an export. Raises InputError for what is none."""
    if not math.isfinite(found.mean) or not (math.isfinite(found.std) and found.std > 0):
        raise InputError(f"{reference}: rewards with mean {found.mean} and deviation {found.std} normalise nothing")
    path = directory / "config.json"
    raw = read_object(path) | {"reward_mean": found.mean, "reward_std": found.std, "reward_reference": reference}
    write_atomically(path, json.dumps(raw, indent=2) + "\n")
    redo_file_digest(directory, path.name)
