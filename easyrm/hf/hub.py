"""Where a model comes from: a directory, `gs://...`, or a name on the Hugging Face hub."""

import re

import huggingface_hub
from etils import epath
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from easyrm.errors import InputError

_MODEL_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "digests.json"]
_NOT_MODEL_FILES = ["original/*", "consolidated*"]


def hub_name(source: str) -> str | None:
    """ "org/name" where `source` is a hub name ("hf://org/name", or "org/name" that is no local path), else None."""
    source = str(source)
    if source.startswith("hf://"):
        return source.removeprefix("hf://").strip("/")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not epath.Path(source).exists():
        return source
    return None


def fetch(source: str | epath.PathLike) -> epath.Path:
    """The path of a model's files: a directory, a file or `gs://...` as it is; a hub name after downloading it.

    Of a hub repository only config.json, the safetensors and digests.json are downloaded. Raises InputError where
    nothing is there.
    """
    name = hub_name(source)
    if name is None:
        path = epath.Path(source)
        if not path.exists():
            raise InputError(f"{source}: no such model; give a directory, gs://... or a hub name as hf://org/name")
        return path
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_MODEL_FILES, ignore_patterns=_NOT_MODEL_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source}: not a local path, and the Hugging Face hub does not give it ({reason}); "
            f"check the name and, for a gated model, set HF_TOKEN"
        ) from error
    return epath.Path(folder)
