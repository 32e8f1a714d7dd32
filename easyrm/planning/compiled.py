"""The real training step, compiled for a slice that is not there, and what its program says."""

import dataclasses
import re
import time

import jax

from easyrm import sharding
from easyrm.chips import GIB, training_flops
from easyrm.config import RunConfig
from easyrm.models.config import LlamaConfig
from easyrm.planning.estimate import Roofline, hbm_traffic, roofline
from easyrm.planning.flops import attention_flops, matmul_flops
from easyrm.planning.hlo import Traffic, read_traffic
from easyrm.planning.topology import Slice, devices_of
from easyrm.planning.workload import Demand, Work
from easyrm.training.program import Program, bytes_per_device

_UNITS = {"": 1 / GIB, "K": 1 / 2**20, "M": 1 / 1024, "G": 1, "T": 1024}
_AMOUNT = r"([\d.]+)([KMGT]?)i?B?"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. `temporaries` is what is alive beside the state at the peak: gradients, saved activations.

    Where the step does not fit, `temporaries` and `peak` are None and `refused` says what the compiler asked for.
    """

    hbm: float
    parameters: int
    moments: int
    temporaries: int | None
    peak: int | None
    host: int
    refused: str

    @property
    def fits(self) -> bool:
        """Whether the compiler placed the step in the chip's memory."""
        return self.peak is not None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one slice. `flops` of all chips in a step, `useful_flops` of them what the pairs need at least.

    `steps` of the whole run; `price` in USD a chip-hour or None. Times are the roofline's, which no run beats.
    """

    slice: Slice
    mesh: dict[str, int]
    remat: str
    work: Work
    demand: Demand
    steps: int
    price: float | None
    memory: Memory
    flops: float
    useful_flops: float
    traffic: Traffic | None
    roofline: Roofline | None
    compile_seconds: float

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization at the roofline: the highest that is possible."""
        return self.useful_flops / self.slice.chips / self.slice.chip.peak_flops / self.roofline.step

    @property
    def hours(self) -> float:
        """Of the whole run, steps alone."""
        return self.steps * self.roofline.step / 3600

    @property
    def cost(self) -> float | None:
        """USD of the whole run, steps alone."""
        return None if self.price is None else self.hours * self.slice.chips * self.price


def compile_plan(
    config: RunConfig, llama: LlamaConfig, tpu: Slice, demand: Demand, work: Work, *, steps: int, price: float | None
) -> Plan:
    """Trace, lower and compile the step of `config` on its mesh over `tpu`. Takes minutes for tens of billions.

    Raises InputError where libtpu is absent, or mesh, slice, model and rows do not go together.
    """
    mesh = sharding.make_mesh(config.mesh_dim, devices_of(tpu))
    program = Program(config, llama, mesh, steps)
    rows = work.rows(demand.batch_size)
    traced = program.trace(rows)
    began = time.monotonic()
    compiled, refused = None, ""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = describe_refusal(str(error))
    seconds = time.monotonic() - began
    remat = program.remat(rows)
    traffic = compiled and read_traffic(compiled.as_text())
    flops = matmul_flops(traced.jaxpr) + attention_flops(llama, demand.visible_keys, remat)
    moved = hbm_traffic(llama, dict(mesh.shape), work, remat, config.optimizer.mu_bytes)
    return Plan(
        slice=tpu,
        mesh=dict(mesh.shape),
        remat=remat,
        work=work,
        demand=demand,
        steps=steps,
        price=price,
        memory=_memory(program, compiled, tpu, refused),
        flops=flops,
        useful_flops=training_flops(llama, demand.tokens, demand.visible_keys),
        traffic=traffic,
        roofline=traffic and roofline(tpu.chip, flops / tpu.chips, moved, traffic.total),
        compile_seconds=seconds,
    )


def _memory(program: Program, compiled: jax.stages.Compiled | None, tpu: Slice, refused: str) -> Memory:
    parameters, moments = (bytes_per_device(jax.tree.leaves(tree)) for tree in program.abstract[:2])
    if compiled is None:
        return Memory(tpu.chip.hbm, parameters, moments, None, None, 0, refused)
    taken = compiled.memory_analysis()
    # The sum of all temporaries is more than is ever alive at once, even more than fits; the peak is what counts.
    peak = taken.peak_memory_in_bytes
    temporaries = peak - parameters - moments
    return Memory(tpu.chip.hbm, parameters, moments, temporaries, peak, taken.host_temp_size_in_bytes, "")


def describe_refusal(message: str) -> str:
    """By how much a step misses, from XLA's out-of-memory message: "needs 34.50 of 15.75 GiB, 18.75 too much"."""
    forms = (rf"Used {_AMOUNT} of {_AMOUNT} hbm", rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)")
    for form in forms:
        if found := re.search(form, message):
            needed, there = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
            return f"needs {needed:.2f} of {there:.2f} GiB, {needed - there:.2f} too much"
    return message.strip().partition("\n")[0][:200]
