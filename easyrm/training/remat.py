"""What a step takes of a device, by arithmetic, and from it which activations are kept for the backward pass."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from easyrm.chips import TPUS, layer_weights, model_weights
from easyrm.models.config import LlamaConfig

FP32, BF16 = 4, 2
# Of a device's memory, by the estimate, that a step may take with every activation kept; in fp32 it takes twice that.
ROOMY = 0.4


def choose_remat(llama: LlamaConfig, mesh: Mesh, tokens: float, memory: float, mu_bytes: int) -> str:
    """ "none" where everything surely fits `memory`, else "nothing_saveable"; `tokens` a device, of a micro-batch."""
    kept = memory_bytes(llama, dict(mesh.shape), tokens, "none", mu_bytes)
    return "none" if kept <= ROOMY * memory else "nothing_saveable"


def device_memory(mesh: Mesh) -> float:
    """Bytes that programs may use on each device of a mesh; every process calls it, and gets the least of them.

    Of a TPU by the table (it need not be there), of a CPU its share of the host's memory.
    """
    device = mesh.devices.flat[0]
    kinds = {chip.kind: chip.hbm for chip in TPUS.values()}
    if device.device_kind in kinds:
        return kinds[device.device_kind]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    else:
        memory = jax.local_devices()[0].memory_stats()["bytes_limit"]
    return float(multihost_utils.process_allgather(np.float32(memory)).min())


def state_bytes(llama: LlamaConfig, shards: int, mu_bytes: int) -> float:
    """Parameters and moments of one device; the mesh shards all matrices over fsdp and mp."""
    return model_weights(llama) * (2 * FP32 + mu_bytes) / shards


def memory_bytes(llama: LlamaConfig, mesh: dict[str, int], tokens: float, remat: str, mu_bytes: int) -> float:
    """About what a step takes of a device: state, gradients, bf16 weights, saved block inputs, one block at work.

    `tokens`: a group of devices with rows of its own computes in one micro-batch.
    """
    shards = mesh["fsdp"] * mesh["mp"]
    weights = llama.num_hidden_layers * layer_weights(llama)
    width, inner = llama.hidden_size, llama.intermediate_size
    kinds = {"nothing_saveable": width, "offload": 0, "none": 14 * width + 5 * inner}
    saved = kinds.get(remat, 8 * width + 3 * inner)
    kept = llama.num_hidden_layers * tokens * saved * BF16 / mesh["mp"]
    block = 2 * layer_weights(llama) * BF16 / mesh["mp"] + tokens * (8 * width + 4 * inner) * BF16 / mesh["mp"]
    return state_bytes(llama, shards, mu_bytes) + weights * (FP32 + BF16) / shards + kept + block
