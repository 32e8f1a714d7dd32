"""A bound is given only where it holds."""

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers
from toy_tokenizer import train_sentencepiece, write_byte_level

from easyrm.data.sentencepiece_model import SentencePieceModel
from easyrm.data.token_bound import longest_token


@pytest.fixture
def byte_level(tmp_path):
    model = tokenizers.Tokenizer.from_file(str(write_byte_level(tmp_path) / "tokenizer.json"))
    model.no_truncation()
    return model


def ids(model, text):
    return model.encode(text, add_special_tokens=False).ids


def test_the_bound_is_reached(byte_level):
    assert longest_token(byte_level) == len("<|finetune_right_pad_id|>")
    assert len(ids(byte_level, "<|finetune_right_pad_id|>")) == 1


def test_sentencepiece_needs_byte_fallback(tmp_path):
    for byte_fallback in (False, True):
        size = 330 if byte_fallback else 70
        path = train_sentencepiece(tmp_path / "x.model", byte_fallback=byte_fallback, vocab_size=size)
        model = SentencePieceModel(path.read_bytes(), "x")
        tokens = model.encode_batch(["龍" * 1000])[0]
        assert (len(tokens) <= 2) == (longest_token(model) == 0) == (not byte_fallback)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(m, "normalizer", normalizers.Strip()), " " * 1000 + "a"),
        (lambda m: setattr(m, "normalizer", normalizers.Replace("a" * 30, "a")), "a" * 3000),
        (lambda m: setattr(m, "pre_tokenizer", pre_tokenizers.Whitespace()), "a" + " " * 1000),
        (lambda m: setattr(m, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")), "a" + " " * 1000),
        (lambda m: setattr(m, "pre_tokenizer", None), "☃" * 1000),
        (lambda m: m.add_special_tokens([tokenizers.AddedToken("<x>", lstrip=True)]), " " * 1000 + "<x>"),
        (lambda m: m.add_special_tokens([tokenizers.AddedToken("<x>", rstrip=True)]), "<x>" + " " * 1000),
    ],
)
def test_what_makes_a_text_vanish_leaves_no_bound(byte_level, change, text):
    bound = longest_token(byte_level)
    change(byte_level)
    assert longest_token(byte_level) == 0
    assert bound * len(ids(byte_level, text)) < len(text)  # the former bound would have been wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(
            m, "normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        ),
        lambda m: m.add_tokens([tokenizers.AddedToken("x" * 99, normalized=True)]),
    ],
)
def test_what_only_lengthens_keeps_the_bound(byte_level, change):
    change(byte_level)
    for text in ("a b " * 500, "x" * 99 * 5):
        assert longest_token(byte_level) * len(ids(byte_level, text)) >= len(text)
    assert longest_token(byte_level) > 0
