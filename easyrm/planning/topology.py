"""TPU slices by name, as devices that can be compiled for and not run on."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from easyrm.chips import TPUS, Chip
from easyrm.errors import InputError, one_line

# Slices of each generation in the order of their size: Google Cloud's TPU pages.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """`name` as "v5p:2x4x4", its generation (a key of TPUS), what one chip can do, and how many there are."""

    name: str
    generation: str
    chip: Chip
    chips: int


def parse_topology(name: str) -> Slice:
    """The slice that a topology's name describes. Raises InputError for a name that describes none."""
    generation, _, shape = name.partition(":")
    if generation not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology={name}: expected a generation ({', '.join(TPUS)}) and a shape, as in v5p:2x4x4 or v5e:4x8"
        )
    sizes = [int(size) for size in shape.split("x")]
    dimensions = len(SLICES[generation][0].split("x"))
    if len(sizes) != dimensions or 0 in sizes:
        raise InputError(
            f"--topology={name}: a slice of {generation} has {dimensions} positive sizes, for example "
            f"{generation}:{SLICES[generation][2]}"
        )
    return Slice(name, generation, TPUS[generation], math.prod(sizes))


def check_libtpu() -> None:
    """Raise InputError where the TPU compiler is not installed."""
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise InputError("easyrm.plan needs libtpu, TPU's compiler, which runs on any Linux: pip install 'easyrm[tpu]'")


def devices_of(tpu: Slice) -> list[jax.Device]:
    """One device a chip, to compile for. Raises InputError where libtpu is absent or refuses the slice."""
    check_libtpu()
    # Two cores of a v4 chip are two devices unless they are asked for as one.
    options = {"chip_config_name": "megacore"} if tpu.generation == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=tpu.name, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--topology={tpu.name}: libtpu does not give this slice ({one_line(error)}); try another"
        ) from error
