"""The shape of a Llama: one dataclass with Hugging Face's names, and the sizes that have names."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What the arithmetic of a Llama depends on; every field is named as in Hugging Face's config.json.

    `rope_scaling` is None or a dict with `rope_type` "llama3" (Llama 3.1, 3.2) or "linear" and its parameters.
    `head_dim` defaults to hidden_size / num_attention_heads, `num_key_value_heads` to num_attention_heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA31 = {**_LLAMA3, "max_position_embeddings": 131072, "rope_scaling": _llama3_scaling(8.0)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": _llama3_scaling(32.0), "tie_word_embeddings": True}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}

# Published shapes, from the config.json of the models of the same names; `debug` is ours.
SIZES: dict[str, LlamaConfig] = {
    "debug": LlamaConfig(32000, 64, 192, 2, 4, 2, max_position_embeddings=2048),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32),
    "llama2-13b": LlamaConfig(32000, 5120, 13824, 40, 40),
    "llama2-70b": LlamaConfig(vocab_size=32000, **_70B),
    "codellama-7b": LlamaConfig(32016, 4096, 11008, 32, 32, max_position_embeddings=16384, rope_theta=1e6),
    "llama3-8b": LlamaConfig(**_LLAMA3, **_8B),
    "llama3-70b": LlamaConfig(**_LLAMA3, **_70B),
    "llama3.1-8b": LlamaConfig(**_LLAMA31, **_8B),
    "llama3.1-70b": LlamaConfig(**_LLAMA31, **_70B),
    "llama3.1-405b": LlamaConfig(
        **_LLAMA31,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    ),
    "llama3.2-1b": LlamaConfig(
        **_LLAMA32,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama3.2-3b": LlamaConfig(
        **_LLAMA32,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
    ),
}
