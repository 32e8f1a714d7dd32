"""Tables, code and folded parts of a model card, out of which no text can break."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What means something in Markdown or HTML; an underscore only where it is not inside a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def text(value: Any) -> str:
    """A value as one line of plain text, other values than text as JSON."""
    value = value if isinstance(value, str) and value else json.dumps(value)
    return _SPECIAL.sub(r"\\\g<0>", " ".join(value.split()))


def code(value: Any) -> str:
    """A value as code within a line."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; without any row, the words that nothing is recorded."""
    rows = ["| " + " | ".join(map(text, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]) if rows else "Not recorded."


def folded(title: str, body: str) -> str:
    """`body` behind a line that opens it."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
