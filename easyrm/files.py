"""Small files that hold JSON or text, written whole or not at all, and the plain values in them."""

import contextlib
import hashlib
import json
import os
from typing import Any

from etils import epath


def write_atomically(path: epath.Path, text: str) -> None:
    """Replace `path` by `text`. A local file is written beside it and renamed; object stores do so by themselves."""
    if "://" in str(path):
        path.write_text(text)
        return
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def absolute(directory: str | epath.Path) -> epath.Path:
    """The directory, wherever the process goes. Orbax fails in the background where it writes to a relative one."""
    directory = epath.Path(directory)
    return directory if "://" in str(directory) else directory.resolve()


def sha256_of(values: dict[str, Any]) -> str:
    """Of plain values: the same before they were written as JSON and after."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def flatten(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted name: {"data": {"train": x}} becomes {"data.train": x}. An empty dict stays."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return flat
