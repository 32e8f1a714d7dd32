"""A Llama with a scalar reward head, read at given positions.

R rows, L row length, B pairs, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from easyrm.models.config import LlamaConfig
from easyrm.models.llama import Linear, Llama


class RewardModel(nnx.Module):
    """The trunk (`model`) and a head without bias (`score`), as in Hugging Face's LlamaForSequenceClassification."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, *, score_std: float = 0.0):
        """Random weights; the head is normal with `score_std`, or 1/sqrt(D + 1) where that is 0 (arXiv 2009.01325)."""
        self.model = Llama(config, rngs)
        self.score = Linear(config.hidden_size, 1, score_std or (config.hidden_size + 1) ** -0.5, rngs)

    def __call__(self, tokens, positions, first_key, last_key, at: jax.Array, **trunk) -> jax.Array:
        """Rewards float32[...] of the tokens at (row, column) = at[0], at[1], each int32[...].

        The four arrays are int32[R, L]; `trunk` goes to Llama.__call__. The final norm and the head see only the
        tokens that are read, and compute in fp32.
        """
        hidden = self.model(tokens, positions, first_key, last_key, **trunk)
        return self.score(self.model.norm(hidden[at[0], at[1]].astype(jnp.float32)))[..., 0]


def cast_kernels(model: RewardModel, dtype: jnp.dtype) -> RewardModel:
    """A copy whose block kernels [layers, I, O] are in `dtype`; embedding, norms and head stay as they are.

    Casting before the layers run lets fully-sharded weights cross the wire in `dtype`, not in fp32.
    """
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 3 else leaf, model)
