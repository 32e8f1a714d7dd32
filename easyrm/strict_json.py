"""JSON from outside: one object with each key once, or an InputError that names the file."""

import json
from typing import Any

from etils import epath

from easyrm.errors import InputError


def read_object(file: epath.Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises FileNotFoundError where there is none, else InputError as `parse_object`."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}); check the file") from error
    return parse_object(text, str(file))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises InputError for all that is not one, naming it as `where`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}; get the file again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found
