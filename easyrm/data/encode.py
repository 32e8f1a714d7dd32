"""From records to token ids, or to the reason why a record is dropped: in order, some at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from easyrm.data import pairs as reasons
from easyrm.data.config import DataConfig
from easyrm.data.groups import Group, group_of_pair, is_group, parse_group
from easyrm.data.pairs import Dropped, check_pair, parse_pair
from easyrm.data.readers import Record
from easyrm.data.template import render
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError, one_line

_CHUNK = 256  # records tokenized at once
_CHUNK_CHARACTERS = 2**24  # or fewer, if their texts are as long as this
_EXAMPLES = 32  # texts kept as they were tokenized


class Encoded(NamedTuple):
    """What became of one record: token ids (uint32) of its `responses`, or `dropped`.

    Of a pair these are chosen and rejected, with `ranks` (0, 1); no `margin` or `probability` is nan.
    """

    line: int
    where: str
    dropped: Dropped | None = None
    margin: float = math.nan
    probability: float = math.nan
    ranks: tuple[int, ...] = ()
    responses: tuple[np.ndarray, ...] = ()


class Encoder:
    """Checks and tokenizes records; `examples` are the first few texts as they were tokenized.

    Where `ranked`, records of ranked responses are taken beside pairs.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, *, ranked: bool = False):
        self.examples: list[str] = []
        self._tokenizer, self._config, self._ranked = tokenizer, config, ranked

    def __call__(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """One Encoded for each record, in order.

        Raises InputError for an unknown role, for ranked responses where they are not taken, and with
        overlong="error" for a conversation of too many tokens.
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
        """The record so far, and the texts of its responses: none if it is dropped already."""
        result, texts = Encoded(record.line, record.where), ()
        try:
            if is_group(record):
                group = self._parse_group(record)
            else:
                pair = check_pair(parse_pair(record), drop_ties=self._config.drop_ties)
                group, result = group_of_pair(pair), result._replace(margin=pair.margin, probability=pair.probability)
            marks = self._tokenizer.bos, self._tokenizer.eos
            texts = tuple(render(response, *marks) for response in group.responses)
            self._check_characters(record.where, max(map(len, texts)))
        except Dropped as dropped:
            # A new one: what was raised holds on to the record through its traceback.
            return result._replace(dropped=Dropped(dropped.reason, dropped.detail)), ()
        return result._replace(ranks=group.ranks), texts

    def _parse_group(self, record: Record) -> Group:
        if not self._ranked:
            raise InputError(
                f"{record.where}: ranked responses where pairs (chosen, rejected) are expected; train on them with "
                "--loss.type=all_pairs or --loss.type=plackett_luce"
            )
        return parse_group(record)

    def _tokenized(self, chunk: list[tuple[Encoded, tuple[str, ...]]]) -> Iterator[Encoded]:
        texts = [text for _, some in chunk for text in some]
        self.examples.extend(texts[: _EXAMPLES - len(self.examples)])
        ids = iter(token_ids(self._tokenizer, texts))
        for result, some in chunk:
            if not some:
                yield result
                continue
            responses = tuple(next(ids) for _ in some)
            try:
                self._check_tokens(result, responses)
            except Dropped as dropped:
                yield result._replace(dropped=dropped)
            else:
                yield result._replace(responses=responses)

    def _check_tokens(self, record: Encoded, responses: tuple[np.ndarray | Dropped, ...]) -> None:
        for response in responses:
            if isinstance(response, Dropped):
                raise response
        for (one, rank), (other, other_rank) in itertools.combinations(zip(responses, record.ranks, strict=True), 2):
            if rank != other_rank and np.array_equal(one, other):
                raise Dropped(reasons.IDENTICAL, f"{_what(record)} have the same tokens")
        longest = max(map(len, responses))
        if longest > self._config.max_length:
            self._overlong(record.where, f"{longest} tokens")

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


def _what(record: Encoded) -> str:
    return "chosen and rejected" if len(record.ranks) == 2 else "two responses of different rank"


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray | Dropped]:
    """Token ids (uint32) of each text, or why the tokenizer refuses it."""
    try:
        return [np.array(tokens, np.uint32) for tokens in tokenizer.encode_batch(texts)]
    except Exception as error:  # the libraries raise bare Exception, and do not say for which text
        if len(texts) > 1:
            return [token_ids(tokenizer, [text])[0] for text in texts]
        return [Dropped(reasons.MALFORMED, f"the tokenizer cannot encode its text ({one_line(error)})")]
