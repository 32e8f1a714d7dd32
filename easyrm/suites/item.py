"""What a suite asks, and what a reward model answered."""

from typing import NamedTuple

from easyrm.data.pairs import Messages


class Item(NamedTuple):
    """The whole conversations of one record that are to be scored; `id` is JSON text, `subset` "" where it has none."""

    id: str | None
    subset: str
    chosen: tuple[Messages, ...]
    rejected: tuple[Messages, ...]
    where: str


class Answer(NamedTuple):
    """The rewards of an item, in its order."""

    id: str | None
    subset: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
