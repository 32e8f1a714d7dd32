"""EasyLM's checkpoints and its forward pass, written from their definition for the tests of the import."""

import msgpack
import numpy as np
from flax import serialization
from ml_dtypes import bfloat16

from easyrm.models.config import LlamaConfig

DTYPES = {"bf16": bfloat16, "fp16": np.float16, "fp32": np.float32}


def shapes(config: LlamaConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays by key; kernels are [in, out]. `head` is score, lm_head or "" (none is stored)."""
    width, mlp, size = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * size
    found = {"transformer/wte/embedding": (config.vocab_size, width), "transformer/ln_f/kernel": (width,)}
    block = {"attention/wq": (width, width), "attention/wk": (width, keys), "attention/wv": (width, keys)}
    block |= {"attention/wo": (width, width), "feed_forward/w1": (width, mlp), "feed_forward/w2": (mlp, width)}
    block |= {"feed_forward/w3": (width, mlp), "attention_norm": (width,), "ffn_norm": (width,)}
    for i in range(config.num_hidden_layers):
        found |= {f"transformer/h/{i}/{name}/kernel": shape for name, shape in block.items()}
    if head:
        found[f"{head}/kernel"] = (width, 1 if head == "score" else config.vocab_size)
    return found


def make_arrays(config: LlamaConfig, head: str = "score", dtype: str = "fp32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays in `dtype`."""
    rng = np.random.default_rng(seed)
    return {
        key: (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(DTYPES[dtype])
        for key, shape in shapes(config, head).items()
    }


def write_stream(path, arrays: dict[str, np.ndarray], prefix: str = "", others=(), limit: int = 2**31 - 1) -> str:
    """As EasyLM's StreamingCheckpointer saves; the fork cuts values of more than `limit` bytes. Returns the path."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, value in [*others, *((prefix + key, value) for key, value in arrays.items())]:
            data, parts = serialization.to_bytes(value), tuple(key.split("/"))
            if len(data) <= limit:
                file.write(packer.pack((parts, data)))
                continue
            for number, at in enumerate(range(0, len(data), limit)):
                file.write(packer.pack(((*parts, f"chunk_{number}"), data[at : at + limit])))
    return str(path)


def tree(arrays: dict[str, np.ndarray]) -> dict:
    """Nested dicts, as a flax_params file holds."""
    root: dict = {}
    for key, value in arrays.items():
        *groups, name = key.split("/")
        node = root
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return root


def from_hugging_face(tensors: dict[str, np.ndarray], config: LlamaConfig) -> dict[str, np.ndarray]:
    """EasyLM's layout of a Hugging Face reward model: kernels transposed, columns of q and k interleaved."""
    names = {"embed_tokens": "wte", "norm": "ln_f", "input_layernorm": "attention_norm", "gate_proj": "feed_forward/w1"}
    names |= {"post_attention_layernorm": "ffn_norm", "up_proj": "feed_forward/w3", "down_proj": "feed_forward/w2"}
    names |= {f"{name}_proj": f"attention/w{name}" for name in "qkvo"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {"score/kernel": tensors["score.weight"].T}
    for name, tensor in tensors.items():
        *groups, last = name.removesuffix(".weight").split(".")
        if last == "score":
            continue
        if last in heads:  # [out, in]: the second half of each head goes between the first
            halves = tensor.reshape(heads[last], 2, -1, tensor.shape[1])
            tensor = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)
        key = f"transformer/h/{groups[2]}/{names[last]}" if "layers" in groups else f"transformer/{names[last]}"
        found[f"{key}/{'embedding' if last == 'embed_tokens' else 'kernel'}"] = (
            tensor if tensor.ndim == 1 or last == "embed_tokens" else tensor.T
        )
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


def forward(arrays: dict[str, np.ndarray], tokens: list[int], config: LlamaConfig, head: str = "score") -> np.ndarray:
    """What EasyLM computes of one conversation, in fp64: the head's output [tokens, outputs]."""
    arrays = {key: value.astype(np.float64) for key, value in arrays.items()}
    size = config.hidden_size // config.num_attention_heads
    angles = np.outer(np.arange(len(tokens)), config.rope_theta ** (-np.arange(0, size, 2) / size))
    turns = np.exp(1j * angles)[:, None]

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns  # neighbours are the parts of one complex number
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    def normed(x: np.ndarray, key: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * arrays[f"{key}/kernel"]

    x = arrays["transformer/wte/embedding"][tokens]
    for i in range(config.num_hidden_layers):
        block = f"transformer/h/{i}"
        y = normed(x, f"{block}/attention_norm")
        q, k, v = ((y @ arrays[f"{block}/attention/w{n}/kernel"]).reshape(len(tokens), -1, size) for n in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(z, config.num_attention_heads // config.num_key_value_heads, axis=1) for z in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(size)
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nqk,knh->qnh", weights, v).reshape(len(tokens), -1) @ arrays[f"{block}/attention/wo/kernel"]
        y = normed(x, f"{block}/ffn_norm")
        gate = y @ arrays[f"{block}/feed_forward/w1/kernel"]
        y = gate / (1 + np.exp(-gate)) * (y @ arrays[f"{block}/feed_forward/w3/kernel"])
        x = x + y @ arrays[f"{block}/feed_forward/w2/kernel"]
    x = normed(x, "transformer/ln_f")
    return x @ (arrays[f"{head}/kernel"] if head else arrays["transformer/wte/embedding"].T)
