"""One program on many hosts: when to start JAX's distributed runtime."""

import glob
import os

import jax


def start_distributed(mode: str) -> None:
    """Call jax.distributed.initialize where `mode` ("auto", "true", "false") and the machine ask for it.

    "auto" does where JAX_COORDINATOR_ADDRESS is set or a TPU is attached; on a TPU pod JAX finds the other hosts by
    itself. Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who. Must run before
    anything touches a device.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    on_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and "cpu" not in os.environ.get(
        "JAX_PLATFORMS", ""
    )
    if jax.distributed.is_initialized() or mode == "false" or (mode == "auto" and not (address or on_tpu)):
        return
    if address and "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ.get("JAX_PROCESS_ID", "0"))
        )
    else:
        jax.distributed.initialize()
