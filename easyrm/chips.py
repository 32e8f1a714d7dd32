"""What accelerators can do, and the arithmetic of a training step.

All figures are those of one JAX device. Peak FLOP/s are dense bf16. A TPU's HBM is what its compiler gives a program
(libtpu 0.0.42); its ICI bandwidth is what a chip can send over all its links together (half of what Google calls
bidirectional). Sources: Google Cloud's TPU pages "TPU v4", "TPU v5e" (1600 Gbit/s), "TPU v5p" (4800 Gbit/s), "TPU v6e"
(800 GB/s bidirectional); for v4's ICI, six links of 50 GB/s, arXiv 2304.01433; NVIDIA's A100, H100 and H200 (SXM) data
sheets.
"""

import dataclasses

from easyrm.models.config import LlamaConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """`kind` as JAX's `device_kind`; bf16 FLOP/s, HBM bytes, HBM bytes/s, ICI bytes/s sent."""

    kind: str
    peak_flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float


# By the name that a topology begins with, as in "v5p:2x4x4".
TPUS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1200e9, 300e9),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5", 459e12, 95.73 * GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 918e12, 31.24 * GIB, 1638e9, 400e9),
}

PEAK_BF16_FLOPS: dict[str, float] = {
    **{chip.kind: chip.peak_flops for chip in TPUS.values()},
    "TPU v5p": 459e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops(config: LlamaConfig, tokens: float, visible_keys: float) -> float:
    """FLOPs that forward and backward need at least: no recomputation, no padding.

    `tokens` are unique tokens, `visible_keys` the keys that they see, summed over tokens. Each multiply-add is two
    FLOPs, the backward pass twice the forward (PaLM, arXiv 2204.02311, appendix B).
    """
    heads = config.num_attention_heads * config.head_dim
    return 6.0 * config.num_hidden_layers * (layer_weights(config) * tokens + 2 * heads * visible_keys)


def model_weights(config: LlamaConfig) -> int:
    """Weights of the matrices of the whole model; norms are small beside them."""
    return config.num_hidden_layers * layer_weights(config) + config.vocab_size * config.hidden_size


def layer_weights(config: LlamaConfig) -> int:
    """Weights of the matrices of one layer."""
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
