"""Exported tokenizer files give the training ids however transformers is asked."""

import json
import random

import pytest
from toy_tokenizer import conversation, sentence, train_sentencepiece, write_byte_level

from easyrm.data import sources
from easyrm.data.template import TEMPLATE, render
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError
from easyrm.hf.tokenizer import check_tokenizer, write_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def talks():
    rng = random.Random(1)
    talks = [conversation(rng, sentence(rng, 1 + i % 7), 1 + i % 11) for i in range(30)]
    hard = ["  two  spaces", "</s> in the text", "tabs\tand\n\n\nlines", "日本語 ☃ é", "<|user|>", " " * 40, "x" * 50]
    return talks + [conversation(rng, f"a{text}b", 3) for text in hard]


@pytest.fixture(params=["sentencepiece", "sentencepiece, other pad", "byte level", "no bos"])
def tokenizer(request, tmp_path):
    if request.param == "sentencepiece":
        return load_tokenizer(str(train_sentencepiece(tmp_path / "tokenizer.model")))
    if request.param == "sentencepiece, other pad":
        model = train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<|user|>"], pad_id=3)
        return load_tokenizer(str(model), pad_token="▁th")
    if request.param == "byte level":
        return load_tokenizer(str(write_byte_level(tmp_path / "in")))
    return load_tokenizer(str(write_byte_level(tmp_path / "in", bos_token="", add_bos=False)))


def ids_of(tokenizer, talks):
    return tokenizer.encode_batch([render(talk, tokenizer.bos, tokenizer.eos) for talk in talks])


def check_all_ways(directory, tokenizer, talks):
    """As AutoTokenizer, beside a Llama's config.json as in an export."""
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.pad_token_id == tokenizer.pad_id != theirs.eos_token_id == tokenizer.eos_id
    assert theirs.model_max_length == 512
    theirs.padding_side = "left"
    for talk, ids in zip(talks, ids_of(tokenizer, talks), strict=True):
        direct = theirs.apply_chat_template(talk, tokenize=True)
        assert (direct if isinstance(direct, list) else direct["input_ids"]) == ids
        text = theirs.apply_chat_template(talk, tokenize=False)
        assert theirs(text).keys() == {"input_ids", "attention_mask"}
        assert theirs(text)["input_ids"] == ids
        batch = theirs([text, 2 * text], padding=True)
        padding = len(batch["input_ids"][1]) - len(ids)
        assert batch["input_ids"][0] == [tokenizer.pad_id] * padding + ids
        assert batch["attention_mask"][0] == [0] * padding + [1] * len(ids)


def test_every_way_of_tokenizing_gives_the_training_ids(tokenizer, talks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer, out, 512)
    check_tokenizer(out, tokenizer, [render(talk, tokenizer.bos, tokenizer.eos) for talk in talks])
    check_all_ways(out, tokenizer, talks)


def test_round_trip(tokenizer, talks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer, out, 512)
    again = load_tokenizer(str(out))
    assert again == tokenizer
    assert ids_of(again, talks) == ids_of(tokenizer, talks)


def test_files_name_the_template_and_the_class(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 512)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    assert ("bos_token" in config) == bool(tokenizer.bos)


def test_a_spoiled_export_is_found(tmp_path, talks):
    tokenizer = load_tokenizer(str(write_byte_level(tmp_path)))
    texts = [render(talk, tokenizer.bos, tokenizer.eos) for talk in talks]
    write_tokenizer(tokenizer, tmp_path, 512)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"token \d+ of .* differs from training"):
        check_tokenizer(tmp_path, tokenizer, texts)
    with pytest.raises(InputError, match="was written for"):
        check_tokenizer(tmp_path, load_tokenizer(str(tmp_path), pad_token="!"), texts)


@pytest.mark.parametrize(
    "name",
    ["golden/tokenizer", "tokenizers/llama2/tokenizer.model", "tokenizers/llama3", "checkpoints/stories260K"],
)
def test_real_tokenizers_on_real_pairs(shared, tmp_path, name):
    tokenizer = load_tokenizer(str(shared / name))
    records = list(sources.read(str(shared / "golden/pairs480.jsonl.gz")))[::20]
    write_tokenizer(tokenizer, tmp_path, 512)
    check_all_ways(tmp_path, tokenizer, [record.value["chosen"] for record in records])
