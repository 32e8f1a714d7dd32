"""The Llama trunk: tokens in, hidden states out. Attributes are named as Hugging Face names them.

R rows, L row length, D width, N heads, K key-value heads, H head size, F width of the MLP.
The modules hold parameters and do arithmetic; they are plain pytrees for jax.jit, jax.grad and jax.lax.scan.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from easyrm.models.config import LlamaConfig
from easyrm.models.matmul import matmul
from easyrm.models.rope import rope_angles, rotate

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Matmul = Callable[[jax.Array, jax.Array], jax.Array]
Constraint = Callable[[jax.Array], jax.Array]


class Kernels(NamedTuple):
    """What a platform computes its own way: `attend` (models/attention), `matmul` (models/matmul.py).

    `unroll` is how many layers one iteration of the loop over them holds.
    """

    attend: Attention
    matmul: Matmul = matmul
    unroll: int = 1


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

    def __call__(self, x: jax.Array, matmul: Matmul = matmul) -> jax.Array:
        return matmul(x, self.kernel.astype(x.dtype))


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

    def __call__(self, x, rope, keys, kernels: Kernels) -> jax.Array:
        attend, matmul, _ = kernels
        split = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_proj(x, matmul).reshape(split), rope)
        k = rotate(self.k_proj(x, matmul).reshape(split), rope)
        v = self.v_proj(x, matmul).reshape(split)
        return self.o_proj(attend(q, k, v, *keys).reshape(*x.shape[:-1], -1), matmul)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        width, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(width, inner, std, rngs)
        self.up_proj = Linear(width, inner, std, rngs)
        self.down_proj = Linear(inner, width, std, rngs)

    def __call__(self, x: jax.Array, matmul: Matmul) -> jax.Array:
        return self.down_proj(_gated(self.gate_proj(x, matmul), self.up_proj(x, matmul)), matmul)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, rounded once from fp32; the backward pass keeps the two arguments alone."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, rope, keys, kernels: Kernels) -> jax.Array:
        x = checkpoint_name(x, "block_input")
        x = x + self.self_attn(self.input_layernorm(x), rope, keys, kernels)
        return x + self.mlp(self.post_attention_layernorm(x), kernels.matmul)


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
        kernels: Kernels,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        constrain: Constraint = lambda x: x,
    ) -> jax.Array:
        """Hidden states before the final norm, [R, L, D] in `dtype`.

        tokens, positions, first_key, last_key int32[R, L]. `remat` is a key of REMAT_POLICIES, `constrain`
        places the residual stream on the devices, once a block.
        """
        # Without the barrier, layers that are not in a loop would each compute the angles again.
        rope = jax.lax.optimization_barrier(rope_angles(positions, self.config))

        def block(x, layer):
            return constrain(layer(x, rope, (first_key, last_key), kernels))

        if remat != "none":
            # Inside a loop nothing merges what is computed again with what was computed before.
            block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=kernels.unroll > 1)
        x = constrain(self.embed_tokens(tokens, dtype))
        x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, self.layers, unroll=kernels.unroll)
        return x
