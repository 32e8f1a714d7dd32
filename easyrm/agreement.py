"""Whether all processes of a run mean the same run: the same code, configuration, data and seed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from easyrm import __version__, peers
from easyrm.errors import InputError
from easyrm.files import flatten
from easyrm.redact import redact

_SHOWN = 8  # differences that a message names
_WIDTH = 40  # characters of a value that a message shows


def agree(facts: dict[str, Any], what: str) -> None:
    """Raise the same InputError on every process where `facts` (JSON values) are not the same on all of them.

    The message names each fact that differs, with its values and who has them; a nested fact goes by its dotted name.
    Every process must call it, and as often as every other; `what` says in messages which call this is. Nothing happens
    where a process is alone.
    """
    run = peers.here()
    if run is None:
        return
    mine = json.dumps(flatten(facts), sort_keys=True)
    if len(set(run.exchange(hashlib.sha256(mine.encode()).hexdigest(), what))) == 1:
        return
    found = differences([json.loads(theirs) for theirs in run.exchange(mine, what)])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise InputError(
        f"processes disagree ({what}): {'; '.join(found[:_SHOWN])}{more}. Start all of them with the same code, "
        "command line and data"
    )


def differences(everyone: list[dict[str, Any]]) -> list[str]:
    """One phrase for each fact that is not the same in all of `everyone`, which has one flat dict a process."""
    found = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        holders: dict[str, list[int]] = {}
        for index, facts in enumerate(everyone):
            text = redact(json.dumps(facts[name], ensure_ascii=False)) if name in facts else "absent"
            holders.setdefault(text, []).append(index)
        if len(holders) > 1:
            same = [len(set(characters)) == 1 for characters in zip(*(holders.keys() - {"absent"}), strict=False)]
            start = [*same, False].index(False)
            said = [f"{_short(text, start)} on {_processes(indices)}" for text, indices in holders.items()]
            found.append(f"{name} is {' and '.join(said)}")
    return found


def code_version() -> str:
    """The version of the package and, of the files that it is made of, the first digits of their SHA-256."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _short(text: str, differs_at: int) -> str:
    # A long value is shown from shortly before the place where it begins to differ.
    start = max(0, min(differs_at - 8, len(text) - _WIDTH)) if len(text) > _WIDTH else 0
    shown = text[start : start + _WIDTH]
    return ("..." if start else "") + shown + ("..." if start + _WIDTH < len(text) else "")


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:4]))
    more = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
    return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"
