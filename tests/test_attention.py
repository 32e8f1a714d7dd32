"""Every implementation of attention against torch's, values and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from easyrm.models.attention import fastest, splash
from easyrm.models.attention.blockwise import blockwise_attention
from easyrm.models.attention.dense import dense_attention
from easyrm.models.attention.pallas_gpu import pallas_gpu_attention
from easyrm.models.attention.splash import block_map, splash_attention

KERNELS = {
    "xla": dense_attention,
    "blockwise": blockwise_attention,
    "splash": functools.partial(splash_attention, interpret=True),
    "pallas_gpu": lambda *given: pallas_gpu_attention(*given, True),
}
# Rows of pairs (chosen, prompt, rejected lengths), the row length, and (heads, key-value heads, head size).
CASES = {
    "grouped heads, padding": (256, [[(40, 50, 61), (9, 17, 30)], [(3, 110, 40)]], (4, 2, 16)),
    "a row exactly full": (128, [[(30, 60, 38)], [(128, 0, 0)]], (2, 2, 16)),
    "a row of padding": (64, [[], [(1, 30, 2)]], (2, 1, 8)),
    "short row": (40, [[(5, 6, 7), (4, 0, 9)]], (3, 1, 12)),
    "odd length": (251, [[(100, 3, 50)], [(0, 90, 20), (13, 40, 0)]], (4, 4, 10)),
    "two kernel blocks of 512": (1024, [[(300, 60, 200), (40, 70, 90)]], (2, 1, 16)),
}


def intervals(length, rows):
    """first_key, last_key int32[R, L] of rows of pairs laid out as chosen reversed, prompt, rejected."""
    first = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    last = first.copy()
    for row, pairs in enumerate(rows):
        begin = 0
        for chosen, prompt, rejected in pairs:
            middle, end = begin + chosen, begin + chosen + prompt + rejected
            last[row, begin:middle] = max(middle + prompt - 1, begin) if prompt else np.arange(begin, middle)
            first[row, middle:end] = middle
            begin = end
        assert begin <= length
    return first, last


def arrays(length, rows, heads, seed=0):
    """q, k, v and a gradient of the output, float32 from a generator, and the intervals."""
    rng = np.random.default_rng(seed)
    queries, keys, size = heads
    drawn = [rng.normal(size=(len(rows), length, n, size)).astype(np.float32) for n in (queries, keys, keys, queries)]
    return *drawn, *intervals(length, rows)


def by_torch(q, k, v, gradient, first, last):
    """Output and gradients of q, k, v from torch's attention in float64, with the mask written out."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    keys = np.arange(q.shape[1])
    mask = torch.tensor((keys >= first[..., None]) & (keys <= last[..., None]))[:, None]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(
        1, 2
    )
    out.backward(torch.tensor(gradient, dtype=torch.float64))
    return [out.detach().numpy(), *(x.grad.numpy() for x in leaves)]


def by(function, q, k, v, gradient, first, last):
    """The same of one of ours."""

    @jax.jit
    def run(q, k, v, gradient):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, first, last), q, k, v)
        return out, *pull(gradient)

    return run(q, k, v, gradient)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchs(kernel, case):
    given = arrays(*CASES[case])
    for ours, expected in zip(by(KERNELS[kernel], *given), by_torch(*given), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_in_bf16_out(kernel):
    given = arrays(*CASES["short row"])
    halves = [jnp.asarray(x, jnp.bfloat16) for x in given[:4]]
    expected = by_torch(*(np.asarray(x, np.float64) for x in halves), *given[4:])
    for ours, reference in zip(by(KERNELS[kernel], *halves, *given[4:]), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)
        assert error < 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    q, k, *rest = arrays(*CASES["short row"])
    q, k = 40 * q, 40 * k
    for ours, expected in zip(by(KERNELS[kernel], q, k, *rest), by_torch(q, k, *rest), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_invisible_keys_do_not_matter(kernel):
    """Values that no other token may see can be anything, and get no gradient from it."""
    q, k, v, gradient, first, last = arrays(*CASES["grouped heads, padding"])
    padding = np.arange(160, 256)
    gradient[1, padding] = 0
    once = by(KERNELS[kernel], q, k, v, gradient, first, last)
    k[1, padding], v[1, padding] = 1e3 * k[1, padding], 1e3
    again = by(KERNELS[kernel], q, k, v, gradient, first, last)
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1, :153], other[1, :153])
    assert not any(np.any(np.asarray(x)[1, padding]) for x in again[1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_inside_shard_map_checkpoint_and_scan(kernel):
    """As a trainer calls it: rows over one mesh axis, heads over another, rematerialised, in a scan over layers."""
    q, k, v, gradient, first, last = arrays(64, [[(10, 20, 30)], [(5, 40, 9)], [], [(20, 3, 25)]], (4, 2, 8))
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    tensor, row = P("rows", None, "heads"), P("rows")
    specs = (tensor, tensor, tensor, row, row)
    sharded = jax.shard_map(KERNELS[kernel], mesh=mesh, in_specs=specs, out_specs=tensor, check_vma=False)

    def two_layers(attend, q, k, v, first, last):
        layer = jax.checkpoint(lambda x, scale: (attend(scale * x, k, v, first, last), None))
        return jax.lax.scan(layer, q, jnp.array([1.0, 0.5]))[0]

    ours = by(functools.partial(two_layers, sharded), q, k, v, gradient, first, last)
    middle = by_torch(q, k, v, gradient, first, last)[0]
    upper = by_torch(0.5 * middle, k, v, gradient, first, last)
    lower = by_torch(q, k, v, 0.5 * upper[1], first, last)
    expected = upper[0], lower[1], lower[2] + upper[2], lower[3] + upper[3]
    for mine, reference in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_no_array_of_scores(kernel):
    """Temporary memory of forward and backward stays far below what the scores of these rows would take."""
    rows, length, heads = 8, 4096, (8, 4, 16)
    q, k, v, gradient, first, last = arrays(length, [[(900, 300, 800)]] * rows, heads)
    run = jax.jit(lambda q, k, v, g: jax.vjp(lambda *x: KERNELS[kernel](*x, first, last), q, k, v)[1](g))
    taken = run.lower(q, k, v, gradient).compile().memory_analysis().temp_size_in_bytes
    scores = 4 * rows * heads[0] * length**2
    assert taken < scores / 4


def test_dense_in_slabs_equals_dense_at_once(monkeypatch):
    given = arrays(*CASES["grouped heads, padding"])
    expected = by(dense_attention, *given)
    monkeypatch.setattr("easyrm.models.attention.dense.SCORES_AT_ONCE", 4 * 32 * 256)
    for ours, reference in zip(by(dense_attention, *given), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-6)


def test_splash_skips_exactly_the_blocks_that_nobody_sees():
    first, last = intervals(512, [[(100, 50, 120), (30, 40, 60)]])
    seen = np.zeros((4, 4), bool)
    for query, key in itertools.product(range(512), range(512)):
        seen[query // 128, key // 128] |= first[0, query] <= key <= last[0, query]
    np.testing.assert_array_equal(block_map(first[0], last[0], 128), seen)
    assert not seen.all()


def test_splash_blocks_fit_the_row():
    sizes = {
        40: (128, 128),
        251: (256, 256),
        384: (128, 384),
        1024: (512, 1024),
        4224: (512, 4608),
        32700: (512, 32768),
    }
    assert {length: splash.block_size(length) for length in sizes} == sizes


def test_splash_refuses_rows_beyond_16_bits():
    row = jnp.zeros((1, 32896), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 32896, 1, 128), jnp.float32)
    with pytest.raises(ValueError, match=r"32896 tokens .* at most 32768, or --model.attention=xla"):
        jax.eval_shape(lambda q: splash_attention(q, q, q, row, row), x)


def test_splash_falls_back_loudly_where_jax_has_changed(monkeypatch):
    given = arrays(*CASES["short row"])
    monkeypatch.setattr(splash.kernel, "_splash_attention", lambda q, k, v: None)
    splash.incompatibility.cache_clear()
    with pytest.warns(UserWarning, match="changed the arguments .* using --model.attention=xla"):
        out = by(splash_attention, *given)[0]
    splash.incompatibility.cache_clear()
    np.testing.assert_allclose(out, by_torch(*given)[0], rtol=0, atol=5e-6)


def test_the_fastest_follows_the_platform():
    assert [fastest(p) for p in ("cpu", "tpu", "gpu", "metal")] == ["blockwise", "splash", "pallas_gpu", "xla"]
