"""Which slice, mesh, micro-batches and remat to compile: all are ranked by arithmetic, the best few compiled."""

import dataclasses
from collections.abc import Iterable, Iterator

from jax.sharding import Mesh

from easyrm.chips import TPUS
from easyrm.config import RunConfig
from easyrm.models.config import LlamaConfig
from easyrm.planning.estimate import Roofline, hbm_traffic, roofline, sent_bytes, step_flops
from easyrm.planning.topology import SLICES, Slice, parse_topology
from easyrm.planning.workload import Demand, Work, work_on
from easyrm.sharding import row_groups
from easyrm.training.remat import memory_bytes

MICRO_BATCHES = (1, 2, 4)
REMATS = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "none")
SLACK = 1.15  # an estimate of memory may be that much too high before a candidate is dropped for it


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the recipe and its estimate; `dollars` a step, or chip-seconds where no price is known."""

    slice: Slice
    mesh: tuple[int, int, int]
    remat: str
    work: Work
    memory: float
    roofline: Roofline
    dollars: float

    @property
    def mesh_dim(self) -> str:
        """As --mesh_dim takes it."""
        return ",".join(map(str, self.mesh))


def all_slices() -> list[Slice]:
    """Every slice of the table, smallest first in each generation."""
    return [parse_topology(f"{name}:{shape}") for name in TPUS for shape in SLICES[name]]


def meshes(llama: LlamaConfig, chips: int) -> Iterator[tuple[int, int, int]]:
    """(dp, fsdp, mp) that divide the model over so many chips, dp 1: replicas hold more and need as many rows."""
    for mp in (1, 2, 4, 8):
        even = llama.num_key_value_heads % mp == 0 and llama.num_attention_heads % mp == 0
        if chips % mp == 0 and even and llama.hidden_size % chips == 0 and llama.intermediate_size % mp == 0:
            yield 1, chips // mp, mp


def rank(
    config: RunConfig, llama: LlamaConfig, demand: Demand, slices: Iterable[Slice], prices: dict[str, float]
) -> tuple[list[Candidate], int]:
    """(candidates that may fit, cheapest first by the estimate; how many were dropped because they cannot)."""
    kept, dropped = [], 0
    for tpu in slices:
        for mesh in meshes(llama, tpu.chips):
            for micro_batches in MICRO_BATCHES:
                for remat in REMATS:
                    candidate = _estimate(config, llama, demand, tpu, mesh, micro_batches, remat, prices)
                    if candidate.memory > SLACK * tpu.chip.hbm or candidate.work.shape.length % mesh[2]:
                        dropped += 1
                    else:
                        kept.append(candidate)
    # Many are bound by compute and cost the same. Programs send more than the estimate: what sends least comes first.
    return sorted(kept, key=lambda found: (found.dollars, found.roofline.ici, found.memory)), dropped


def to_compile(ranked: list[Candidate]) -> Iterator[Candidate]:
    """The cheapest first, one of each slice and mesh after the other, since neighbours on the list are alike."""
    seen = set()
    for candidate in ranked:
        key = candidate.slice.name, candidate.mesh
        if key not in seen:
            seen.add(key)
            yield candidate


def idle_note(work: Work, better_mesh: str) -> str:
    """One line about groups of devices that a step's pairs cannot fill, "" where there are none."""
    if not work.idle:
        return ""
    advice = f"--mesh_dim={better_mesh} leaves none idle" if better_mesh else "take fewer devices or larger batches"
    full = work.groups - work.idle
    return (
        f"the pairs of a step fill {full} of {work.groups} groups of devices (dp * fsdp), the rest is padding: {advice}"
    )


def idle_devices(config: RunConfig, llama: LlamaConfig, mesh: Mesh, demand: Demand) -> str:
    """The same of a run on a mesh that is there."""
    work = work_on(demand, config, row_groups(mesh), config.data.micro_batches)
    return idle_note(work, fewer_idle(llama, mesh.size, demand, config))


def fewer_idle(llama: LlamaConfig, chips: int, demand: Demand, config: RunConfig) -> str:
    """The mesh of so many chips whose groups all have rows, with the smallest mp; "" where there is none."""
    for mesh in meshes(llama, chips):
        if not work_on(demand, config, mesh[0] * mesh[1], config.data.micro_batches).idle:
            return ",".join(map(str, mesh))
    return ""


def _estimate(config, llama, demand, tpu, mesh, micro_batches, remat, prices) -> Candidate:
    axes, mu_bytes = dict(zip(("dp", "fsdp", "mp"), mesh, strict=True)), config.optimizer.mu_bytes
    work = work_on(demand, config, mesh[0] * mesh[1], micro_batches)
    flops = step_flops(llama, work, demand.visible_keys, remat) / tpu.chips
    moved, sent = hbm_traffic(llama, axes, work, remat, mu_bytes), sent_bytes(llama, axes, work, remat)
    limits = roofline(tpu.chip, flops, moved, sent)
    memory = memory_bytes(llama, axes, work.tokens, remat, mu_bytes)
    cost = limits.step / 3600 * tpu.chips * prices[tpu.generation] if prices else limits.step * tpu.chips
    return Candidate(tpu, mesh, remat, work, memory, limits, cost)
