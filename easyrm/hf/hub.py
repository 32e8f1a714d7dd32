"""Where a model comes from: a directory, `gs://...`, or a name on the Hugging Face hub."""

import contextlib
import re
import shutil

import huggingface_hub
from etils import epath
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from easyrm.data.retry import may_pass
from easyrm.errors import InputError, Unavailable, one_line

MODEL_FILES = {
    "allow_patterns": ["config.json", "*.safetensors", "*.safetensors.index.json", "digests.json"],
    "ignore_patterns": ["original/*", "consolidated*"],
}


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

    Of a hub repository only config.json, the safetensors and digests.json are downloaded, by every host. Raises
    InputError where nothing is there, and, before the download, where it does not fit on the disk; Unavailable where
    the hub says that it cannot now.
    """
    name = hub_name(source)
    if name is None:
        path = epath.Path(source)
        if not path.exists():
            raise InputError(f"{source}: no such model; give a directory, gs://... or a hub name as hf://org/name")
        return path
    try:
        with contextlib.suppress(DryRunError):  # no connection: what is in the cache will do
            _check_space(source, huggingface_hub.snapshot_download(name, dry_run=True, **MODEL_FILES))
        return epath.Path(huggingface_hub.snapshot_download(name, **MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if may_pass(error):
            raise Unavailable(f"{source}: the Hugging Face hub does not give it now ({one_line(error)})") from error
        raise InputError(
            f"{source}: not a local path, and the Hugging Face hub does not give it ({one_line(error)}); "
            f"check the name and, for a gated model, set HF_TOKEN"
        ) from error


def _check_space(source: str | epath.PathLike, files: list[huggingface_hub.DryRunFileInfo]) -> None:
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = epath.Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise InputError(
            f"{source}: {needed / 1e9:.1f} GB to download, and {cache} has {free / 1e9:.1f} GB free; copy the model "
            "to a bucket once and give gs://..., of which a host reads its share alone, or set HF_HOME to a larger disk"
        )
