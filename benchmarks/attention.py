"""How long attention takes, forward and backward, by implementation; prints one JSON line.

    python benchmarks/attention.py --platform=gpu --rows=8 --length=4096 --heads=32 --kv_heads=8 --head_dim=64 \\
        --dtype=bf16 --implementations=xla,pallas_gpu,cudnn

Rows are filled with random preference pairs laid out as training lays them out; --pair gives the median lengths of
chosen, prompt and rejected. `ms` is the median of the repeats, which take the implementations in turn; `max_error` is
the largest absolute difference of output and gradients from `xla` in fp32; `tflops` counts the products over visible
keys only (14 * heads * head_dim a visible pair of query and key, forward and backward). `cudnn` is
jax.nn.dot_product_attention with the mask as an array, a candidate that only this benchmark knows. An implementation
that cannot run has an `error` in place of figures.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from easyrm.models.attention import IMPLEMENTATIONS

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--platform", default="cpu", help="cpu, gpu or tpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--pair", default="80,76,80", help="median tokens of chosen, prompt, rejected")
    parser.add_argument("--implementations", default="xla,blockwise")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def random_intervals(flags: argparse.Namespace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """first_key and last_key int32[R, L] of rows filled with pairs of log-normal lengths, padding at the end."""
    medians = np.array([int(x) for x in flags.pair.split(",")])
    first = np.tile(np.arange(flags.length, dtype=np.int32), (flags.rows, 1))
    last = first.copy()
    for row in range(flags.rows):
        begin = 0
        while True:
            chosen, prompt, rejected = np.maximum(1, medians * rng.lognormal(0, 0.6, 3)).astype(int)
            middle, end = begin + chosen, begin + chosen + prompt + rejected
            if end > flags.length:
                break
            last[row, begin:middle] = middle + prompt - 1
            first[row, middle:end] = middle
            begin = end
    return first, last


def cudnn(q, k, v, first_key, last_key):
    keys = jnp.arange(q.shape[1])
    mask = (keys >= first_key[..., None]) & (keys <= last_key[..., None])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")


def compile_step(function, arrays):
    """Output and gradients of q, k and v, compiled: a function of nothing."""

    def step(q, k, v, gradient, first_key, last_key):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, first_key, last_key), q, k, v)
        return out, *pull(gradient)

    compiled = jax.jit(step).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def seconds(step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    flags = arguments()
    jax.config.update("jax_platforms", {"gpu": "cuda,cpu"}.get(flags.platform, flags.platform))
    rng, dtype = np.random.default_rng(flags.seed), DTYPES[flags.dtype]
    first, last = random_intervals(flags, rng)
    shape = (flags.rows, flags.length)
    heads = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    drawn = [jnp.asarray(rng.normal(size=(*shape, n, flags.head_dim)), dtype) for n in heads]
    expected = compile_step(IMPLEMENTATIONS["xla"], (*(x.astype(jnp.float32) for x in drawn), first, last))()

    steps, figures = {}, {}
    for name in flags.implementations.split(","):
        function = cudnn if name == "cudnn" else IMPLEMENTATIONS[name]
        try:
            steps[name] = compile_step(function, (*drawn, first, last))
            ours = steps[name]()
        except Exception as error:  # a candidate that this device, dtype or shape rules out is a result
            steps.pop(name, None)
            figures[name] = {"error": str(error).strip().splitlines()[0][:200]}
            continue
        differences = [jnp.abs(a.astype(jnp.float32) - b).max() for a, b in zip(ours, expected, strict=True)]
        figures[name] = {"max_error": float(max(differences))}
    taken = {name: [] for name in steps}
    for _ in range(flags.repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    visible = int((last.astype(np.int64) - first + 1).sum())
    for name, times in taken.items():
        median = float(np.median(times))
        work = 14 * visible * flags.heads * flags.head_dim
        figures[name] |= {"ms": round(1e3 * median, 3), "tflops": round(work / median / 1e12, 4)}
    device = jax.devices()[0].device_kind
    visible_a_query = round(visible / first.size, 1)
    print(json.dumps({"device": device, "visible_keys_a_query": visible_a_query, **vars(flags), "results": figures}))


if __name__ == "__main__":
    main()
