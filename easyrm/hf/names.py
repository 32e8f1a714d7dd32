"""Our parameter paths and Hugging Face's tensor names: the one table between the two.

Every kernel is the transpose of Hugging Face's weight and layers are stacked on a leading axis; nothing is permuted.
"""

import dataclasses
import re

from easyrm.models.config import LlamaConfig

# Not parameters: old Llama checkpoints stored the rotary frequencies of each layer.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
LM_HEAD = "lm_head.weight"
LM_HEAD_PATH = "lm_head/kernel"
SCORE_PATH = "score/kernel"


@dataclasses.dataclass(frozen=True)
class Weight:
    """The Hugging Face tensor(s) behind one of our leaves.

    `name` holds "{i}" where our leaf stacks `layers` of them (0: not stacked). `shape` is that of one tensor as
    Hugging Face stores it; `transposed` says that our kernel is [in, out] where Hugging Face's weight is [out, in].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    layers: int = 0

    @property
    def names(self) -> list[str]:
        """Tensor names in the order in which our leaf stacks them."""
        return [self.name.format(i=i) for i in range(self.layers)] if self.layers else [self.name]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of our leaf."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (self.layers, *shape) if self.layers else shape


def weights(config: LlamaConfig, *, causal: bool = False) -> dict[str, Weight]:
    """All parameters of a reward model of this shape, by our path ("model/layers/self_attn/q_proj/kernel").

    With `causal`, those of a causal model: an LM head, unless it is the embedding, in place of the score head.
    """
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    table = {
        "model/embed_tokens/weight": Weight("model.embed_tokens.weight", (config.vocab_size, width)),
        "model/norm/weight": Weight("model.norm.weight", (width,)),
    }
    if not causal:
        table[SCORE_PATH] = Weight("score.weight", (1, width), transposed=True)
    elif not config.tie_word_embeddings:
        table[LM_HEAD_PATH] = Weight(LM_HEAD, (config.vocab_size, width), transposed=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table[f"model/layers/{norm}/weight"] = Weight(f"model.layers.{{i}}.{norm}.weight", (width,), layers=layers)
    kernels = {
        "self_attn/q_proj": (queries, width),
        "self_attn/k_proj": (keys, width),
        "self_attn/v_proj": (keys, width),
        "self_attn/o_proj": (width, queries),
        "mlp/gate_proj": (mlp, width),
        "mlp/up_proj": (mlp, width),
        "mlp/down_proj": (width, mlp),
    }
    for path, shape in kernels.items():
        name = f"model.layers.{{i}}.{path.replace('/', '.')}.weight"
        table[f"model/layers/{path}/kernel"] = Weight(name, shape, transposed=True, layers=layers)
    return table
