"""digests.json of an exported model: what its small files and its parameters were when they were written.

A damaged file can still parse, and would then be another model. Directories without digests.json are not checked.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from easyrm.errors import InputError
from easyrm.files import write_atomically
from easyrm.strict_json import read_object

NAME = "digests.json"
MODEL_FILES = ("config.json", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FORMAT = 1
_WAY_OUT = f"get it again, or remove {NAME} if the change is meant"


def write_digests(directory: epath.PathLike, parameters: dict[str, str]) -> None:
    """Writes digests.json for the small files in `directory` and the digests of the `parameters` by path."""
    directory = epath.Path(directory)
    files = {name: _sha256(directory / name) for name in MODEL_FILES + TOKENIZER_FILES if (directory / name).exists()}
    text = json.dumps({"format": _FORMAT, "files": files, "parameters": parameters}, indent=2) + "\n"
    (directory / NAME).write_text(text)


def redo_file_digest(directory: epath.PathLike, name: str) -> None:
    """Makes digests.json, where there is one, tell of the file `name` as it is now."""
    directory = epath.Path(directory)
    content = _read(directory)
    if content["files"]:
        content["files"][name] = _sha256(directory / name)
        write_atomically(directory / NAME, json.dumps(content, indent=2) + "\n")


def check_files(directory: epath.PathLike, names: Sequence[str] = MODEL_FILES + TOKENIZER_FILES) -> None:
    """InputError where one of the `names` in `directory` is not as digests.json says.

    What is absent is left to its reader: from the hub, only the files that are needed come.
    """
    directory = epath.Path(directory)
    recorded = _read(directory)
    for name in names:
        file, expected = directory / name, recorded["files"].get(name)
        if expected and file.exists() and _sha256(file) != expected:
            raise InputError(f"{file}: not the file that {NAME} beside it tells of; {_WAY_OUT}")


def recorded_parameters(directory: epath.PathLike) -> dict[str, str]:
    """The parameters' digests by path, empty where there is no digests.json. Raises InputError where it is damaged."""
    return _read(epath.Path(directory))["parameters"]


def check_parameter(directory: epath.PathLike, path: str, found: str, recorded: dict[str, str]) -> None:
    """InputError unless the digest `found` of a loaded parameter is the `recorded` one."""
    if recorded.get(path) != found:
        raise InputError(f"{directory}: the weights hold another {path} than {NAME} tells of; {_WAY_OUT}")


def _read(directory: epath.Path) -> dict[str, Any]:
    if not (directory / NAME).exists():
        return {"files": {}, "parameters": {}}
    content = read_object(directory / NAME)
    if content.get("format") != _FORMAT:
        raise InputError(f"{directory / NAME}: format={content.get('format')!r}, and this easyrm reads 1; upgrade it")
    files, parameters = content.get("files"), content.get("parameters")
    sound = set(content) == {"format", "files", "parameters"} and _maps(files, 64) and _maps(parameters, 8)
    if not sound or set(files) - set(MODEL_FILES + TOKENIZER_FILES) or "config.json" not in files or not parameters:
        raise InputError(f"{directory / NAME}: damaged; get it again, or remove it to load the model unchecked")
    return content


def _maps(value: Any, digits: int) -> bool:
    """Whether `value` gives so many hexadecimal digits by name."""
    return isinstance(value, dict) and all(
        isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) for text in value.values()
    )


def _sha256(file: epath.Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}); check the file") from error
