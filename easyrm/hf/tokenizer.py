"""Tokenizer files for an export: whichever way a user tokenizes, the ids are those of the training.

BOS comes from the chat template alone; the tokenizer itself adds nothing. So `apply_chat_template(tokenize=True)`,
`tokenizer(apply_chat_template(tokenize=False))` and rewardbench's rendering agree.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from easyrm.data.sentencepiece_model import SentencePieceModel
from easyrm.data.template import TEMPLATE
from easyrm.data.tokenizer import Tokenizer, load_tokenizer
from easyrm.errors import InputError

# sentencepiece_model.proto, ModelProto.SentencePiece.Type
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4


def write_tokenizer(tokenizer: Tokenizer, directory: os.PathLike | str, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Loads in transformers 4.51 and 5 as PreTrainedTokenizerFast; `max_length` becomes model_max_length. A sentencepiece
    model is converted to a `tokenizers` BPE.
    """
    directory = epath.Path(directory)
    tokens = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    tokens |= {"unk_token": tokenizer.unk, "pad_token": tokenizer.pad}
    tokens = {name: token for name, token in tokens.items() if token}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this list 4.x passes token_type_ids, which Llama refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
        # Inline for transformers before 4.52, which do not read chat_template.jinja.
        "chat_template": TEMPLATE,
    }
    _write_json(directory / "tokenizer.json", _fast_tokenizer(tokenizer))
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", tokens)
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def check_tokenizer(directory: os.PathLike | str, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raises InputError if the files in `directory` do not encode each text exactly as `tokenizer` does."""
    texts, written = list(texts), load_tokenizer(os.fspath(directory))
    if written != tokenizer:
        raise InputError(f"tokenizer in {directory}: {written} was written for {tokenizer}; export from another")
    encoded = (encoding.ids for encoding in written.model.encode_batch(texts))
    for text, here, there in zip(texts, tokenizer.encode_batch(texts), encoded, strict=True):
        if here != there:
            at = next(
                (i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there))
            )
            raise InputError(
                f"tokenizer in {directory}: token {at} of {text[:60]!r} differs from training "
                f"({here[at : at + 3]} became {there[at : at + 3]}); train with a tokenizer.json instead"
            )


def _write_json(path: epath.Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer.json: it parses special tokens, adds none and neither truncates nor pads."""
    if isinstance(tokenizer.model, SentencePieceModel):
        return _convert(tokenizer.model)
    content = json.loads(tokenizer.model.to_str())
    content["post_processor"] = _without_templates(content["post_processor"])
    return content


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The post-processor without what adds tokens; a ByteLevel one stays: it only moves offsets."""
    if processor is None or processor["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor["type"] == "Sequence":
        kept = [kept for part in processor["processors"] if (kept := _without_templates(part)) is not None]
        return {"type": "Sequence", "processors": kept} if kept else None
    return processor


def _convert(model: SentencePieceModel) -> dict[str, Any]:
    """A `tokenizers` BPE with the ids of a sentencepiece BPE, normalized as Llama's legacy tokenizer."""
    pieces = model.proto.pieces
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    prefix = model.proto.normalizer_spec.add_dummy_prefix
    normalizers = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    decoders += [{"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(model, token) for token in sorted(model.marks, key=model.token_to_id)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _added_token(model: SentencePieceModel, token: str) -> dict[str, Any]:
    index = model.token_to_id(token)
    special = model.proto.pieces[index].type != _USER_DEFINED
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": special}


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best scored third first.

    sentencepiece stores no merges: it joins the neighbours whose joint piece scores highest, the leftmost among equals.
    Where scores tie (Llama 2's runs of spaces) the leftmost is what has already grown, so long left parts go first.
    """
    scores = {piece.piece: piece.score for piece in model.proto.pieces if piece.type == _NORMAL}
    merges = [
        (-score, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=lambda merge: (merge[0], -len(merge[1]), -len(merge[2])))
    return [(left, right) for _, left, right in merges]
