"""The Llama trunk: tokens in, hidden states out. Attributes are named as Hugging Face names them.

R rows, L row length, D width, N heads, K key-value heads, H head size, F width of the MLP.
The modules hold parameters and do arithmetic; they are plain pytrees for jax.jit, jax.grad and jax.lax.scan.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from easyrm.models.config import LlamaConfig
from easyrm.models.rope import rope_angles, rotate

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Constraint = Callable[[jax.Array], jax.Array]

_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "nothing_saveable": _policies.nothing_saveable,
    "dots_saveable": _policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": _policies.dots_with_no_batch_dims_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Linear(nnx.Module):
    """x [..., I] -> [..., O] without bias; kernel fp32[I, O], normal with the given standard deviation."""

    def __init__(self, inputs: int, outputs: int, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # "highest" keeps fp32 operands fp32 on TPU and GPU; bf16 operands are not affected by it.
        return jnp.dot(x, self.kernel.astype(x.dtype), precision="highest")


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; statistics and scale in fp32, output in x's dtype."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids int32[R, L] -> [R, L, D]; weight fp32[V, D]."""

    def __init__(self, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, width)))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Cast after the look-up: the gradient's scatter-add then sums in fp32 what frequent tokens collect.
        return self.weight[tokens].astype(dtype)


class SelfAttention(nnx.Module):
    """Grouped-query attention: N query heads share K key-value heads."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, std = config.hidden_size, config.initializer_range
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(width, queries, std, rngs)
        self.k_proj = Linear(width, keys, std, rngs)
        self.v_proj = Linear(width, keys, std, rngs)
        self.o_proj = Linear(queries, width, std, rngs)

    def __call__(self, x, rope, keys, attend: Attention) -> jax.Array:
        split = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(split), rope)
        k = rotate(self.k_proj(x).reshape(split), rope)
        v = self.v_proj(x).reshape(split)
        return self.o_proj(attend(q, k, v, *keys).reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(width, inner, std, rngs)
        self.up_proj = Linear(width, inner, std, rngs)
        self.down_proj = Linear(inner, width, std, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, rope, keys, attend: Attention) -> jax.Array:
        x = checkpoint_name(x, "block_input")
        x = x + self.self_attn(self.input_layernorm(x), rope, keys, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """The trunk, up to and including the final norm; layers are stacked on a leading axis and scanned."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.initializer_range, rngs)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        first_key: jax.Array,
        last_key: jax.Array,
        *,
        attend: Attention,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        constrain: Constraint = lambda x: x,
    ) -> jax.Array:
        """Hidden states before the final norm, [R, L, D] in `dtype`.

        tokens, positions, first_key, last_key int32[R, L]. `attend` mixes values (models/attention.py), `remat` is a
        key of REMAT_POLICIES, `constrain` places the residual stream on the devices, once a block.
        """
        rope = rope_angles(positions, self.config)

        def block(x, layer):
            return constrain(layer(x, rope, (first_key, last_key), attend))

        if remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x = constrain(self.embed_tokens(tokens, dtype))
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, self.layers)
        return x
