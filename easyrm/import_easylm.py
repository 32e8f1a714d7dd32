"""An EasyLM checkpoint to a Hugging Face directory: `python -m easyrm.import_easylm --checkpoint=params::PATH ...`."""

import jax
from absl import flags
from etils import epath

from easyrm.data.tokenizer import load_tokenizer
from easyrm.distributed import say
from easyrm.errors import InputError
from easyrm.flags import run_command
from easyrm.hf.easylm import import_model
from easyrm.hf.source import ModelSource
from easyrm.models.config import SIZES

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "KIND::PATH as EasyLM's --load_checkpoint: params, trainstate_params, trainstate or flax_params"
)
_CONFIG = flags.DEFINE_string("config", "", f"the model's shape: {', '.join(SIZES)}, a config.json or its directory")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "a directory, a hub name or a tokenizer.model")
_OUTPUT = flags.DEFINE_string("output", "", "the Hugging Face directory to write; must not exist")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the written weights")


def import_easylm() -> None:
    """Write the checkpoint's model. Raises InputError for what is not there or does not fit."""
    for flag in (_CHECKPOINT, _CONFIG, _TOKENIZER, _OUTPUT):
        if not flag.value:
            raise InputError(f"--{flag.name} is empty; --checkpoint, --config, --tokenizer and --output are all needed")
    config = _CONFIG.value
    if config not in SIZES and "/" not in config and not epath.Path(config).exists():
        raise InputError(f"--config={config}: no such file or size; give a config.json, or {', '.join(SIZES)}")
    # Only checksums are computed; on a TPU pod, JAX would wait here for the other hosts.
    jax.config.update("jax_platforms", "cpu")
    import_model(
        _CHECKPOINT.value,
        ModelSource("", config).config,
        load_tokenizer(_TOKENIZER.value),
        _OUTPUT.value,
        dtype=_DTYPE.value,
        say=say,
    )


if __name__ == "__main__":
    run_command(import_easylm)
