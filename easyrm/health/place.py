"""Which process of the run this is, where the others are, and how many devices they should have."""

import contextlib
import dataclasses
import os
import re

from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from easyrm.distributed import asked_for, who_is_who
from easyrm.errors import InputError

# How many JAX devices a unit of Google's accelerator types is: v4 and v5p count TensorCores, two a device.
_DEVICES = {"v2": 1, "v3": 1, "v4": 0.5, "v5p": 0.5, "v5litepod": 1, "v5e": 1, "v6e": 1}
_NAME_SECONDS = 10  # that the coordinator's name may take to be known


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `index` of `count`, the `coordinator` as HOST:PORT ("" for one host alone), host `names` where known."""

    index: int = 0
    count: int = 1
    coordinator: str = ""
    names: tuple[str, ...] = ()

    def name_of(self, index: int) -> str:
        """ "process 3 (its-host)", as far as it is known."""
        name = self.names[index] if index < len(self.names) else ""
        if index == 0:
            name = name or self.coordinator.rpartition(":")[0]
        return f"process {index}" + (f" ({name})" if name else "")


def find_place(mode: str) -> Place:
    """As `start_distributed` will be told: by JAX_COORDINATOR_ADDRESS and its companions, or by JAX's own detection.

    Raises InputError where that says nothing or something malformed.
    """
    if not asked_for(mode):
        return Place()
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if address and (explicit := who_is_who(os.environ)):
        return Place(explicit[2], explicit[1], address)
    known = clusters.ClusterEnv._cluster_types
    cluster = next((kind for kind in known if not kind.opt_in_only_method and kind.is_env_present()), None)
    if cluster is None:
        raise InputError(
            "JAX finds no cluster that says who is who: set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID on every host, or give --distributed=false for one host alone"
        )
    try:
        address = address or cluster.get_coordinator_address(
            timeout_secs=_NAME_SECONDS, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        index, count, names = cluster.get_process_id(), cluster.get_process_count(), ()
    except Exception as error:  # of JAX, of requests, of what the cluster's variables hold
        raise InputError(
            f"JAX cannot find the other hosts by what this machine ({cluster.name}) says of them ({error}): see that "
            "all hosts are up and their names known here, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID on every host"
        ) from error
    with contextlib.suppress(AttributeError):  # only clusters of TPUs have a list, which is one slice's
        workers = tuple(cluster._get_worker_list_in_slice())
        names = workers if len(workers) == count else ()
    return Place(index, count, address, names)


def expected_devices(flag: int) -> tuple[int, str]:
    """(number of devices in all, who says so): --devices, or the accelerator's type; (0, "") where nothing does."""
    if flag:
        return flag, f"--devices={flag}"
    kind, source = os.environ.get("TPU_ACCELERATOR_TYPE", ""), "TPU_ACCELERATOR_TYPE"
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if not kind and cloud_tpu_cluster.running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in os.environ:
        kind, source = cloud_tpu_cluster.get_metadata("accelerator-type")[0], "accelerator type"
        slices = cloud_tpu_cluster.get_tpu_env_value("MEGASCALE_NUM_SLICES")
    match = re.fullmatch(r"(v\w+)-(\d+)", kind)
    if not match or match[1] not in _DEVICES:
        return 0, ""
    return int(int(match[2]) * _DEVICES[match[1]]) * int(slices or 1), f"{source} {kind}"
