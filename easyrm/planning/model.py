"""The shape of a recipe's model, without its weights."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from easyrm.config import ModelConfig
from easyrm.errors import InputError
from easyrm.hf.config import read_config
from easyrm.hf.hub import hub_name
from easyrm.models.config import SIZES, LlamaConfig

# Models on the hub that are of a named size: no network is needed to plan for them. A few tokens more, as fine-tunes
# add to the vocabulary, change no figure here.
PUBLISHED = {
    "allenai/tulu-2-13b": "llama2-13b",
    "allenai/llama-3.1-tulu-2-8b": "llama3.1-8b",
    "allenai/llama-3.1-tulu-2-70b": "llama3.1-70b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Llama-3.1-8B": "llama3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama3.1-70b",
}


def model_shape(config: ModelConfig) -> LlamaConfig:
    """The LlamaConfig of `config` (a named size or file), else of `init_from`, of which only config.json is fetched.

    Raises InputError where neither is given or the hub does not answer.
    """
    if config.config:
        return SIZES[config.config] if config.config in SIZES else read_config(config.config)[0]
    if not config.init_from:
        raise InputError("no model: give --recipe, --model.config (a named size) or --model.init_from")
    name = hub_name(config.init_from)
    if name is None:
        return read_config(config.init_from)[0]
    if name in PUBLISHED:
        return SIZES[PUBLISHED[name]]
    try:
        return read_config(huggingface_hub.hf_hub_download(name, "config.json"))[0]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--model.init_from={config.init_from}: the hub does not give its config.json; give its size instead, "
            "as in --model.config=llama3.1-8b"
        ) from error
