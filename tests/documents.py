"""The repository's Markdown pages, taken apart: fenced blocks, the commands in them, prose, links and anchors."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "tpu_launch").glob("*.md")])
_FENCE = re.compile(r"^```([\w-]*) *\n(.*?)^``` *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line."""

    page: Path
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """What a reader types at once, with its line and as it stands there, continuation lines joined."""

    line: int
    text: str


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; those of one info string where `language` is given."""
    text = page.read_text()
    found = [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def commands(block: Block) -> list[Command]:
    """The commands of a bash block: one a line, unless a line ends in a backslash; comments alone are none."""
    found, open_line = [], False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if open_line:
            found[-1] = Command(found[-1].line, f"{found[-1].text.removesuffix(chr(92))}{line.strip()}")
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append(Command(number, line.strip()))
        else:
            continue
        open_line = line.endswith("\\")
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def links(page: Path) -> list[str]:
    """The targets of the page's links and pictures."""
    return _LINK.findall(_CODE.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """The names that the repository's web page gives to the headings."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without the two lines at a table's top."""
    section = re.split(rf"^#+ {re.escape(heading)}$", prose(page), maxsplit=1, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]
