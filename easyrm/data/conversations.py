"""From conversations to token ids, or to the reason why one cannot be scored."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from easyrm.data import pairs as reasons
from easyrm.data.encode import token_ids
from easyrm.data.pairs import Dropped, Messages
from easyrm.data.template import render
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError

_AT_ONCE = 256  # texts tokenized at once


class Conversation(NamedTuple):
    """Token ids (int32) of a whole conversation; those whose `prompt` is equal may share its computation."""

    prompt: Hashable
    tokens: np.ndarray


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Messages], max_length: int
) -> list[Conversation | Dropped]:
    """Each conversation as the model was trained on it; the prompt is all but the last message.

    What has more than `max_length` tokens, or what the tokenizer refuses, is the reason instead.
    """
    marks = tokenizer.bos, tokenizer.eos
    return encode_texts(
        tokenizer,
        [(render(messages[:-1], *marks), render(messages, *marks)) for messages in conversations],
        max_length,
    )


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[tuple[Hashable, str]], max_length: int
) -> list[Conversation | Dropped]:
    """The same for (prompt, text) of conversations that are rendered already."""
    found: list[Conversation | Dropped] = []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        # To tokenize megabytes takes minutes: what its characters prove to be overlong is not.
        sizes = [_fewest_tokens(tokenizer, text) for _, text in some]
        ids = iter(token_ids(tokenizer, [t for (_, t), size in zip(some, sizes, strict=True) if size <= max_length]))
        for (prompt, _), size in zip(some, sizes, strict=True):
            if size > max_length:
                found.append(_overlong(f"at least {size}", max_length))
                continue
            tokens = next(ids)
            if isinstance(tokens, np.ndarray):
                long = len(tokens) > max_length
                tokens = _overlong(len(tokens), max_length) if long else Conversation(prompt, tokens.astype(np.int32))
            found.append(tokens)
    return found


def check_vocabulary(conversations: Iterable[Conversation | Dropped], vocab_size: int) -> None:
    """Raises InputError for a token id that a model of this size lacks."""
    largest = max((int(found.tokens.max()) for found in conversations if isinstance(found, Conversation)), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"token id {largest} is beyond the model's vocab_size={vocab_size}; give the tokenizer it was made with"
        )


def _fewest_tokens(tokenizer: Tokenizer, text: str) -> int:
    return -(-len(text) // tokenizer.longest_token) if tokenizer.longest_token else 0


def _overlong(size: int | str, max_length: int) -> Dropped:
    return Dropped(reasons.OVERLONG, f"{size} tokens, more than max_length={max_length}")
