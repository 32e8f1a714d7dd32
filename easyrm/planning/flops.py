"""FLOPs of a training step, counted in its jaxpr: what is really computed, recomputation and padding included."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from easyrm.models.config import LlamaConfig

# Products of heads * H by a visible key: the kernel's forward pass has two; its backward pass is two kernels, which
# compute the scores again, of three and four.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 7


def matmul_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """FLOPs of all matrix products, over all devices; a scan's body counts as often as it runs.

    Pallas kernels are left out: what they skip depends on the data. A `while` counts once.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "cond":
            total += max(map(matmul_flops, equation.params["branches"]))
        elif name != "pallas_call":
            times = equation.params["length"] if name == "scan" else 1
            times = equation.params["mesh"].size if name == "shard_map" else times
            total += times * sum(map(matmul_flops, _inner(equation.params)))
    return total


def attention_flops(llama: LlamaConfig, visible_keys: float, remat: str) -> float:
    """FLOPs of the attention kernels of a step whose tokens see so many keys; blocks seen in part count in part."""
    products = FORWARD_PRODUCTS * (1 if remat == "none" else 2) + BACKWARD_PRODUCTS
    width = llama.num_attention_heads * llama.head_dim
    return 2.0 * products * llama.num_hidden_layers * width * visible_keys


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds)):
        if isinstance(value, kinds):
            yield value
