"""Rewards over HTTP, for PPO loops: `python -m easyrm.serve --model=HF_DIR|RUN_DIR --port=8000`."""

import functools
import os

import jax
from absl import flags

from easyrm.distributed import start_distributed, who_is_who
from easyrm.errors import InputError
from easyrm.flags import run_command
from easyrm.scoring.scorer import BATCH_TOKENS, open_scorer

_MODEL = flags.DEFINE_string("model", "", "a Hugging Face directory or hub name, or RUN_DIR[/checkpoints/STEP]")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "the address to listen at; 0.0.0.0: all, and anyone may ask")
_PORT = flags.DEFINE_integer("port", 8000, "0: one that is free", lower_bound=0, upper_bound=65535)
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the matmuls")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp, as in train_rm")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "tokens a conversation; 0: as the model was trained", lower_bound=0)
_NORMALIZE = flags.DEFINE_bool("normalize", False, "by the reward_mean and reward_std of the model's config.json")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", BATCH_TOKENS, "tokens on the devices at once", lower_bound=1)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 256, "conversations scored together", lower_bound=1)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 4096, "conversations that may wait", lower_bound=1)
_MAX_INPUTS = flags.DEFINE_integer("max_inputs", 1024, "conversations of a request", lower_bound=1)
_MAX_BODY_MB = flags.DEFINE_integer("max_body_mb", 64, "megabytes of a request", lower_bound=1)


def serve() -> None:
    """Answer POST /score and GET /health until SIGTERM. Raises InputError for what is not there."""
    if not _MODEL.value:
        raise InputError("--model is empty; give a reward model's directory, its hub name or a run's directory")
    if not _HOST.value:
        raise InputError("--host is empty, which would be every address; give one, or 0.0.0.0 for all")
    try:
        from easyrm.serving.app import Limits
        from easyrm.serving.server import run_server
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install easyrm[serve]") from error
    limits = Limits(_MAX_BATCH.value, _MAX_QUEUE.value, _MAX_INPUTS.value, _MAX_BODY_MB.value)
    _one_host()
    opener = functools.partial(
        open_scorer,
        _MODEL.value,
        mesh_dim=_MESH_DIM.value,
        dtype=_DTYPE.value,
        batch_tokens=_BATCH_TOKENS.value,
        max_length=_MAX_LENGTH.value,
        normalize=_NORMALIZE.value,
    )
    run_server(opener, host=_HOST.value, port=_PORT.value, limits=limits)


def _one_host() -> None:
    explicit = who_is_who(os.environ) if os.environ.get("JAX_COORDINATOR_ADDRESS") else None
    if explicit is None:
        start_distributed("auto")
    count = explicit[1] if explicit else jax.process_count()
    if count > 1:
        raise InputError(f"serve runs on one host, and this is one of {count} processes; start it on a single host")


if __name__ == "__main__":
    run_command(serve)
