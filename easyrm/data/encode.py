"""From records to token ids, or to the reason why a record is dropped: in order, some at a time."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from easyrm.data import pairs as reasons
from easyrm.data.config import DataConfig
from easyrm.data.outcomes import json_id
from easyrm.data.pairs import Dropped, check_pair, parse_pair, parse_scored
from easyrm.data.readers import Record
from easyrm.data.retry import one_line
from easyrm.data.template import render
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError

_CHUNK = 256  # records tokenized at once
_CHUNK_CHARACTERS = 2**24  # or fewer, if their texts are as long as this
_EXAMPLES = 32  # texts kept as they were tokenized


class Encoded(NamedTuple):
    """What became of one record: token ids (uint32) of both sides, or `dropped`; no margin is nan.

    For scores, `id` is JSON text (None where there is none), and `single` tells a conversation from a pair.
    """

    line: int
    where: str
    id: str | None
    single: bool
    dropped: Dropped | None = None
    margin: float = math.nan
    chosen: np.ndarray | None = None
    rejected: np.ndarray | None = None


class Encoder:
    """Checks and tokenizes records; `examples` are the first few texts as they were tokenized."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, scoring: bool):
        self.examples: list[str] = []
        self._tokenizer, self._config, self._scoring = tokenizer, config, scoring

    def __call__(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """One Encoded for each record, in order.

        Raises InputError for an unknown role, and with overlong="error" for a conversation of too many tokens.
        """
        chunk, characters = [], 0
        for record in records:
            chunk.append(self._rendered(record))
            characters += sum(map(len, chunk[-1][1]))
            if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
                yield from self._tokenized(chunk)
                chunk, characters = [], 0
        yield from self._tokenized(chunk)

    def _rendered(self, record: Record) -> tuple[Encoded, tuple[str, ...]]:
        """The record so far, and the texts of its sides: none if it is dropped already."""
        single = isinstance(record.value, dict) and "messages" in record.value
        result, texts = Encoded(record.line, record.where, None, single), ()
        try:
            if self._scoring:
                result = result._replace(id=json_id(record))
                pair = parse_scored(record)
            else:
                pair = check_pair(parse_pair(record), drop_ties=self._config.drop_ties)
            texts = tuple(
                render(side, self._tokenizer.bos, self._tokenizer.eos) for side in (pair.chosen, pair.rejected)
            )
            self._check_characters(record.where, max(map(len, texts)))
        except Dropped as dropped:
            # A new one: what was raised holds on to the record through its traceback.
            return result._replace(dropped=Dropped(dropped.reason, dropped.detail)), ()
        return result._replace(margin=pair.margin), texts

    def _tokenized(self, chunk: list[tuple[Encoded, tuple[str, ...]]]) -> Iterator[Encoded]:
        texts = [text for _, sides in chunk for text in sides]
        self.examples.extend(texts[: _EXAMPLES - len(self.examples)])
        ids = iter(self._ids(texts))
        for result, sides in chunk:
            if not sides:
                yield result
                continue
            chosen, rejected = (next(ids) for _ in sides)
            try:
                self._check_tokens(result.where, chosen, rejected)
            except Dropped as dropped:
                yield result._replace(dropped=dropped)
            else:
                yield result._replace(chosen=chosen, rejected=rejected)

    def _ids(self, texts: list[str]) -> list[np.ndarray | Dropped]:
        """Token ids of each text, or why the tokenizer refuses it."""
        try:
            return [np.array(tokens, np.uint32) for tokens in self._tokenizer.encode_batch(texts)]
        except Exception as error:  # the libraries raise bare Exception, and do not say for which text
            if len(texts) > 1:
                return [self._ids([text])[0] for text in texts]
            return [Dropped(reasons.MALFORMED, f"the tokenizer cannot encode its text ({one_line(error)})")]

    def _check_tokens(self, where: str, chosen: np.ndarray | Dropped, rejected: np.ndarray | Dropped) -> None:
        for side in (chosen, rejected):
            if isinstance(side, Dropped):
                raise side
        if not self._scoring and np.array_equal(chosen, rejected):
            raise Dropped(reasons.IDENTICAL, "chosen and rejected have the same tokens")
        longest = max(len(chosen), len(rejected))
        if longest > self._config.max_length:
            self._overlong(where, f"{longest} tokens")

    def _check_characters(self, where: str, longest: int) -> None:
        """Drops what its characters alone prove to be overlong: to tokenize megabytes takes minutes."""
        covers = self._tokenizer.longest_token
        if covers and longest > covers * self._config.max_length:
            self._overlong(where, f"{longest} characters (at least {-(-longest // covers)} tokens)")

    def _overlong(self, where: str, size: str) -> None:
        limit = self._config.max_length
        if self._config.overlong == "error":
            raise InputError(
                f"{where}: a conversation of {size} exceeds --data.max_length={limit}; "
                "raise it, or use --data.overlong=drop"
            )
        raise Dropped(reasons.OVERLONG, f"{size}, more than max_length={limit}")
