"""The bf16 product of CPUs against products in float64, alone and inside the training step of a mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easyrm.models.matmul import cpu_bf16_matmul
from easyrm.sharding import make_mesh


def arrays(rows, length, inputs, outputs, seed=0):
    """x, kernel and gradient of the product, bf16 and as the same values in float64."""
    shapes = (rows, length, inputs), (inputs, outputs), (rows, length, outputs)
    rng = np.random.default_rng(seed)
    narrow = [rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in shapes]
    return narrow, [array.astype(np.float64) for array in narrow]


def value_and_gradients(x, kernel, gradient):
    out, pull = jax.vjp(cpu_bf16_matmul, x, kernel)
    return out, *pull(gradient)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 96, 64, 24), (3, 130, 40, 72), (1, 7, 33, 5)])
def test_products_and_gradients_are_rounded_once(shape):
    narrow, (x, kernel, gradient) = arrays(*shape)
    flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    expected = x @ kernel, gradient @ kernel.T, flat[0].T @ flat[1]
    for found, exact in zip(jax.jit(value_and_gradients)(*narrow), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        # Half a step of bf16 of each element, and what sums in fp32 lose.
        np.testing.assert_array_less(np.abs(found - exact), 2.0**-8 * np.abs(exact) + 1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("mesh_dim", ["1,4,1", "1,2,2", "1,1,4"])
def test_sharded_as_in_training(mesh_dim):
    narrow, _ = arrays(4, 64, 32, 48)
    mesh = make_mesh(mesh_dim)
    rows = NamedSharding(mesh, PartitionSpec(("dp", "fsdp"), "mp", None))
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "mp"))
    sharded = jax.jit(value_and_gradients, in_shardings=(rows, kernel, rows), out_shardings=(rows, rows, kernel))
    alone = jax.jit(value_and_gradients)(*narrow)
    for found, exact in zip(sharded(*narrow), alone, strict=True):
        exact = np.asarray(exact, np.float32)
        np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-6, atol=0.02 * exact.std())
