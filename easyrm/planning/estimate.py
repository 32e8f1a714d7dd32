"""Arithmetic of a step on a slice: bytes held, read and sent by a chip, and the time that each takes at least.

It ranks what is not compiled, and gives the HBM traffic of what is. W weights of all layers, D width, F width of the
MLP, all fp32 in the state and bf16 on the wire.
"""

import dataclasses

from easyrm.chips import Chip, layer_weights
from easyrm.models.config import LlamaConfig
from easyrm.planning.workload import Work
from easyrm.training.remat import BF16, FP32, state_bytes


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step if one thing alone took time, on a chip; the step takes at least the longest."""

    compute: float
    hbm: float
    ici: float

    @property
    def step(self) -> float:
        """Seconds of a step at least."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def bound_by(self) -> str:
        """What takes the longest."""
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, hbm_bytes: float, sent_bytes: float) -> Roofline:
    """The roofline of a chip that does `flops`, moves `hbm_bytes` and sends `sent_bytes` in a step."""
    return Roofline(flops / chip.peak_flops, hbm_bytes / chip.hbm_bandwidth, sent_bytes / chip.ici_bandwidth)


def hbm_traffic(llama: LlamaConfig, mesh: dict[str, int], work: Work, remat: str, mu_bytes: int) -> float:
    """Bytes that a chip reads and writes at least: the state once, gathered weights and activations in each pass."""
    passes = 2 if remat == "none" else 3
    shards = mesh["fsdp"] * mesh["mp"]
    weights = llama.num_hidden_layers * layer_weights(llama)
    tokens = work.shape.capacity / work.groups
    activations = tokens * (10 * llama.hidden_size + 4 * llama.intermediate_size) * BF16 / mesh["mp"]
    state = 2 * state_bytes(llama, shards, mu_bytes) + 3 * FP32 * weights * work.micro_batches / shards
    gathered = 2 * passes * work.micro_batches * weights * BF16 / mesh["mp"]
    return state + gathered + passes * llama.num_hidden_layers * activations


def sent_bytes(llama: LlamaConfig, mesh: dict[str, int], work: Work, remat: str) -> float:
    """Bytes that a chip sends: weights gathered in each pass, gradients scattered, activations between mp shards."""
    passes = 2 if remat == "none" else 3
    weights = llama.num_hidden_layers * layer_weights(llama) * BF16 / mesh["mp"]
    fsdp, mp, dp = (1 - 1 / mesh[axis] for axis in ("fsdp", "mp", "dp"))
    tokens = work.shape.capacity / work.groups
    residual = llama.num_hidden_layers * tokens * llama.hidden_size * BF16
    replicas = 2 * weights * 2 / mesh["fsdp"] * dp
    return (passes + 1) * work.micro_batches * weights * fsdp + 4 * passes * residual * mp + replicas


def step_flops(llama: LlamaConfig, work: Work, visible_keys: float, remat: str) -> float:
    """FLOPs of a step, all chips: every token of every row, padding too, and one more forward pass with remat."""
    passes = 3 if remat == "none" else 4
    heads = llama.num_attention_heads * llama.head_dim
    products = layer_weights(llama) * work.shape.capacity + 2 * heads * visible_keys
    return 2.0 * passes * llama.num_hidden_layers * products
