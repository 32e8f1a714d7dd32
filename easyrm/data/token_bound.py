"""How many characters one token can stand for: what proves a text too long without tokenizing it."""

import json
from typing import Any

import tokenizers

from easyrm.data.sentencepiece_model import SentencePieceModel

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def longest_token(model: tokenizers.Tokenizer | SentencePieceModel) -> int:
    """Characters that one token covers at most; 0 where no such bound can be proved.

    There is none where characters may vanish or melt into one token, however many they are: without a token for every
    byte, in a normalizer or pre-tokenizer that shortens the text, beside added tokens that swallow white space.
    """
    if isinstance(model, SentencePieceModel):
        return max(map(len, model.pieces)) if model.proto.trainer_spec.byte_fallback else 0
    added, vocabulary = model.get_added_tokens_decoder().values(), model.get_vocab(with_added_tokens=True)
    pre_tokenizers = _parts(model.pre_tokenizer, "pretokenizers")
    if (
        any(token.lstrip or token.rstrip for token in added)
        or not all(map(_lengthens, _parts(model.normalizer, "normalizers")))
        or not all(map(_keeps, pre_tokenizers))
        or not _covers_all(model.model, vocabulary, any(part["type"] == "ByteLevel" for part in pre_tokenizers))
    ):
        return 0
    normalize = model.normalizer.normalize_str if model.normalizer else str
    return max(map(len, [*vocabulary, *(normalize(token.content) for token in added)]))


def _parts(component: Any, key: str) -> list[dict]:
    """The description of each step of a tokenizer's normalizer or pre-tokenizer (None: no steps)."""
    if component is None:
        return []
    steps = [json.loads(component.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in (step[key] if step["type"] == "Sequence" else [step])]
    return steps


def _lengthens(normalizer: dict) -> bool:
    if normalizer["type"] == "Replace":
        return len(normalizer["content"]) >= len(normalizer["pattern"].get("String", normalizer["content"] + "."))
    return normalizer["type"] == "Prepend"


def _keeps(pre_tokenizer: dict) -> bool:
    if pre_tokenizer["type"] == "Split":
        return pre_tokenizer["behavior"] != "Removed"
    return pre_tokenizer["type"] in ("ByteLevel", "Metaspace", "Digits")


def _covers_all(model: Any, vocabulary: dict[str, int], byte_level: bool) -> bool:
    """Whether every character has a token or several: no unknown ones, which may be dropped or fused."""
    if not isinstance(model, tokenizers.models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if byte_level:
        return set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
    return bool(model.byte_fallback) and vocabulary.keys() >= _BYTES
