"""What accelerators can do, by JAX's `device_kind`, and the arithmetic of a training step.

Peak dense bf16 FLOP/s of one JAX device. Sources: Google Cloud's TPU pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e";
NVIDIA's A100, H100 and H200 (SXM) data sheets.
"""

from easyrm.models.config import LlamaConfig

PEAK_BF16_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops(config: LlamaConfig, tokens: int, visible_keys: int) -> float:
    """FLOPs that forward and backward need at least: no recomputation, no padding.

    `tokens` are unique tokens, `visible_keys` the keys that they see, summed over tokens. Each multiply-add is two
    FLOPs, the backward pass twice the forward (PaLM, arXiv 2204.02311, appendix B).
    """
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    return 6.0 * config.num_hidden_layers * (layer * tokens + 2 * heads * visible_keys)
