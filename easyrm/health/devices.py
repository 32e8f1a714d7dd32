"""What the devices of all hosts can do together: their number, the mesh, a matrix product and an all-reduce of each.

Runs as a program of its own (`python -m easyrm.health.devices`), which `easyrm.health.trial` starts and watches:
JAX's runtime may hang or abort, and a TPU must be free again afterwards. On stdin comes one JSON object, on stdout go
lines of JSON: {"begins": check}, {"finding": ...}, {"rates": ...} and at last {"done": true}.
"""

import dataclasses
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easyrm.chips import PEAK_BF16_FLOPS
from easyrm.distributed import start_distributed, together
from easyrm.errors import InputError, Unavailable
from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Finding, plural
from easyrm.health.tpu import accelerators
from easyrm.sharding import check_heads, make_mesh

_SECONDS = 0.2  # that a matrix product is repeated for
_REPEATS = 5  # of which the fastest all-reduce counts
_POOR = 0.4  # of a chip's peak; a product of this size reaches more on a device that nothing else uses
_WIDTH = {"cpu": (1024, jnp.float32)}  # of the matrices, and their dtype
_BYTES = {"cpu": 4 * 2**20}  # that each device gives to the all-reduce


def seen(expected: int, source: str) -> Finding:
    """Number and kind of the devices that JAX sees, against `expected` (0: not known) as `source` says."""
    devices, local = jax.devices(), jax.local_devices()
    kind = devices[0].device_kind
    text = f"{plural(len(devices), 'device')} of kind {kind}"
    if jax.process_count() > 1:
        text += f", {len(local)} on this host"
    if devices[0].platform == "cpu" and accelerators():
        return Finding(
            "devices", FAIL, f"{text}, though this host has an accelerator", "pip install -e '.[tpu]' or '.[cuda]'"
        )
    if expected and len(devices) != expected:
        return Finding(
            "devices",
            FAIL,
            f"{text}, but {expected} are expected ({source})",
            "see that all hosts and chips of the slice run, that the command runs on every host, or give --devices",
        )
    return Finding("devices", OK, text + (f", as expected ({source})" if expected else "; give --devices to check"))


def mesh_fits(mesh_dim: str, heads: tuple[int, int] | None) -> Finding:
    """Whether --mesh_dim fits the devices and, where the model's (heads, key-value heads) are known, these."""
    mesh = make_mesh(mesh_dim)
    if heads:
        check_heads(mesh, *heads)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return Finding("mesh", OK, f"--mesh_dim={mesh_dim}: {sizes}")


def matmul() -> tuple[Finding, dict[str, float]]:
    """TFLOP/s of each of this host's devices, one after the other, also as {device: rate}."""
    local = jax.local_devices()
    width, dtype = _WIDTH.get(local[0].platform, (8192, jnp.bfloat16))
    host = np.random.default_rng(0).standard_normal((2, width, width), np.float32)
    x, w = host[0].astype(dtype), (host[1] / np.sqrt(width)).astype(dtype)

    @jax.jit
    def chain(x, w, repeats):
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ w, x)

    def prepare(device):
        here = jax.device_put((x, w), device)
        return jax.block_until_ready(chain(*here, 1)), here

    with ThreadPoolExecutor(len(local)) as pool:
        prepared = list(pool.map(prepare, local))
    rates = {}
    for device, (result, here) in zip(local, prepared, strict=True):
        if not bool(jnp.isfinite(result).all()):
            return Finding("matmul", FAIL, f"{device} gives a product that is not finite", "replace this host"), {}
        run = partial(chain, *here)
        once = _seconds(lambda run=run: run(2)) / 2
        repeats = int(min(1000, max(1, _SECONDS / once)))
        rates[str(device.id)] = 2 * width**3 * repeats / _seconds(lambda run=run, n=repeats: run(n)) / 1e12
    kind, values = local[0].device_kind, list(rates.values())
    text, figures = f"{{rate}} TFLOP/s a device ({jnp.dtype(dtype)}, {width} x {width})", {"rate": values}
    state, way_out = OK, ""
    if peak := PEAK_BF16_FLOPS.get(kind):
        figures["share"] = [100 * value * 1e12 / peak for value in values]
        text += f", {{share}} % of the peak of a {kind}"
        if min(values) * 1e12 < _POOR * peak:
            state, way_out = WARN, "see what else uses the device, and whether it is throttled"
    return Finding("matmul", state, text, way_out, figures), rates


def all_reduce() -> Finding:
    """GB/s of an all-reduce over all devices of all hosts, whose result is compared with what it must be."""
    devices = np.array(jax.devices())
    count = len(devices)
    if count == 1:
        return Finding("all-reduce", SKIPPED, "not applicable: one device")
    mesh = Mesh(devices, ("all",))
    size = _BYTES.get(devices[0].platform, 64 * 2**20) // 4
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    # Device i gives i + 1 everywhere; the sum is exact in fp32.
    x = jax.make_array_from_callback(
        (count, size), sharding, lambda index: np.full((1, size), index[0].start + 1, np.float32)
    )
    program = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec()
        )
    )
    total = jax.block_until_ready(program(x))
    if any((np.asarray(shard.data) != count * (count + 1) / 2).any() for shard in total.addressable_shards):
        return Finding("all-reduce", FAIL, f"the sum over {count} devices is wrong", "replace the hosts one by one")
    best = min(_seconds(lambda: program(x)) for _ in range(_REPEATS))
    rate = 2 * (count - 1) / count * 4 * size / best / 1e9
    text = f"{{rate}} GB/s a device, right over {count} devices ({4 * size // 2**20} MiB each)"
    return Finding("all-reduce", OK, text, figures={"rate": [rate]})


def slow_devices(rates: dict[int, dict[str, float]], slowest: float = 0.7) -> list[tuple[int, Finding]]:
    """(host, finding) for each device whose rate is under `slowest` of the median; `rates` by host and device."""
    everything = [rate for devices in rates.values() for rate in devices.values()]
    usual = statistics.median(everything) if everything else 0
    found = []
    for host, devices in rates.items():
        slow = [f"device {name} {rate:.3g}" for name, rate in devices.items() if rate < slowest * usual]
        if slow:
            text = f"slow: {', '.join(slow)} TFLOP/s, where the median of all is {usual:.3g}"
            found.append(
                (host, Finding("matmul", WARN, text, "see what else uses it; if nothing does, replace the host"))
            )
    return found


def main() -> None:
    """One JSON object in, findings out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no finding
    asked = json.load(sys.stdin)
    faulthandler.dump_traceback_later(asked["seconds"] + 10, exit=True)  # should nobody watch any more

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    def check(name: str, look: Callable[[], Finding]) -> None:
        tell(begins=name)
        try:
            finding = look()
        except (InputError, Unavailable) as error:
            finding = Finding(name, FAIL, str(error))
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            finding = Finding(name, FAIL, text, "see the message; the runtime's own log says more")
        tell(finding=dataclasses.asdict(finding))

    def product() -> Finding:
        finding, rates = matmul()
        if jax.devices()[0].platform != "cpu":  # emulated devices share the same cores
            tell(rates=rates)
        return finding

    tell(begins="devices")
    with together():
        start_distributed(asked["distributed"], asked["seconds"])
        check("devices", lambda: seen(asked["expected"], asked["source"]))
        check("mesh", lambda: mesh_fits(asked["mesh_dim"], asked["heads"]))
        check("matmul", product)
        check("all-reduce", all_reduce)
        tell(done=True)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
