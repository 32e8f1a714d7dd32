"""Token ids equal sentencepiece's, tokenizers' and the recorded ones; bad tokenizers are refused in one line."""

import errno
import json
import shutil
import socket
import tempfile

import numpy as np
import pytest
import sentencepiece
import tokenizers
from etils.epath import backend
from test_import_easylm import Bucket
from toy_tokenizer import train_sentencepiece, write_byte_level

from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError

TEXTS = ["<s><|user|>\nthe cat </s>\n  a dog</s>", "", " ☃<unk>é", "</s></s> x", "plain green river"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


def test_of_a_bucket_no_copy_stays(model_file, tmp_path, monkeypatch):
    bucket, others = Bucket(), backend.fsspec_backend._get_filesystem
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: bucket if name == "gcs" else others(name)
    )
    bucket.pipe_file("gs://b/tokenizer/tokenizer.model", model_file.read_bytes())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there = load_tokenizer("gs://b/tokenizer")
    assert there == load_tokenizer(str(model_file)) and there.encode_batch(["a dog"])
    assert list(tmp_path.iterdir()) == []


def test_sentencepiece_encodes_every_stretch_on_its_own(model_file):
    tokenizer = load_tokenizer(str(model_file))
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).Encode
    expected = [
        [1, *encode("<|user|>\nthe cat "), 2, *encode("\n  a dog"), 2],
        [],
        [*encode(" ☃"), 0, *encode("é")],
        [2, 2, *encode(" x")],
        encode("plain green river"),
    ]
    assert tokenizer.encode_batch(TEXTS) == expected
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk) == ("<s>", "</s>", "<unk>", "<unk>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 0, 330)
    assert "<unk>" in tokenizer.pad_reason


def test_what_the_cache_holds_needs_no_network(model_file, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--cached" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copy(model_file, snapshot / "tokenizer.model")
    (tmp_path / "models--org--cached" / "refs").mkdir()
    (tmp_path / "models--org--cached" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def unreachable(*_, **__):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    found, here = load_tokenizer("hf://org/cached"), load_tokenizer(str(model_file))
    assert found.encode_batch(TEXTS) == here.encode_batch(TEXTS)


def test_a_hub_that_fails_without_a_word_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(InputError, match=r"not on the hub \(OSError\); check the name"):
        load_tokenizer("hf://org/none")


def test_json_is_used_as_it_is_and_adds_nothing(tmp_path):
    tokenizer = load_tokenizer(str(write_byte_level(tmp_path)))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.no_truncation()
    text = "<|begin_of_text|>the cat of seven rivers and more of it<|end_of_text|>"
    assert raw.encode(text).ids[:2] == [0, 0]  # the file by itself would add a second BOS
    assert tokenizer.encode_batch([text]) == [raw.encode(text).ids[1:]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")) == tokenizer
    assert "<|finetune_right_pad_id|>" in tokenizer.pad_reason


def test_json_wins_over_model_and_the_model_is_found_in_a_directory(tmp_path, model_file):
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    assert load_tokenizer(str(tmp_path)) == load_tokenizer(str(model_file))
    assert load_tokenizer(str(write_byte_level(tmp_path))).eos == "<|end_of_text|>"


def test_pad_rules(tmp_path, model_file):
    directory = write_byte_level(tmp_path, pad_token="<|begin_of_text|>")
    assert load_tokenizer(str(directory)).pad == "<|begin_of_text|>"
    assert load_tokenizer(str(directory), pad_token="!").pad_reason == "as --data.pad_token says"
    assert load_tokenizer(str(model_file), pad_token="<s>").pad_id == 1
    with pytest.raises(InputError, match=r"pad token </s> .* also EOS.*--data.pad_token="):
        load_tokenizer(str(model_file), pad_token="</s>")
    with pytest.raises(InputError, match=r"pad token '<none>' is not in its vocabulary"):
        load_tokenizer(str(model_file), pad_token="<none>")
    with pytest.raises(InputError, match=r"also EOS"):
        load_tokenizer(str(write_byte_level(tmp_path, pad_token="<|end_of_text|>")))
    content = json.loads((directory / "tokenizer.json").read_text().replace("<|finetune_right_pad_id|>", "<|other|>"))
    write_byte_level(tmp_path)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"no pad token.*--data.pad_token="):
        load_tokenizer(str(directory))


def test_a_configured_special_token_is_parsed_as_one(tmp_path):
    """transformers does so on loading: an export could not repeat the ids otherwise."""
    directory = write_byte_level(tmp_path)
    whole = load_tokenizer(str(directory), pad_token="Ġcat")
    assert [whole.pad_id] in whole.encode_batch(["Ġcat"])


def test_bad_tokenizers_are_refused(tmp_path, model_file):
    with pytest.raises(InputError, match=r"no EOS token"):
        load_tokenizer(str(write_byte_level(tmp_path / "no_eos", eos_token=None)))
    with pytest.raises(InputError, match=r"eos token '<end>' is not in its vocabulary"):
        load_tokenizer(str(write_byte_level(tmp_path / "other_eos", eos_token="<end>")))
    no_eos = train_sentencepiece(tmp_path / "no_eos.model", eos_id=-1)
    with pytest.raises(InputError, match=r"no EOS token"):
        load_tokenizer(str(no_eos))
    for source, message in [
        ("/nowhere/at/all", "no such file or directory"),
        ("", "--tokenizer="),
        (str(tmp_path), "neither tokenizer.json nor tokenizer.model"),
    ]:
        with pytest.raises(InputError, match=message):
            load_tokenizer(source)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "broken.model"))
    broken = write_byte_level(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a tokenizer file"):
        load_tokenizer(str(broken))
    with pytest.raises(InputError, match="train it with --normalization_rule_name=identity"):
        load_tokenizer(str(train_sentencepiece(tmp_path / "nfkc.model", normalization_rule_name="nmt_nfkc")))
    with pytest.raises(InputError, match="not a BPE model"):
        load_tokenizer(str(train_sentencepiece(tmp_path / "unigram.model", model_type="unigram")))


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/tokenizer.model"])
def test_recorded_token_ids(shared, name):
    """The ancestor's ids of 16 real pairs."""
    recorded = json.loads((shared / "golden/token_ids.json").read_text())["pairs_512"]
    tokenizer = load_tokenizer(str(shared / "golden" / name))
    store = build_store(
        str(shared / "golden/pairs480.jsonl.gz"), tokenizer, DataConfig(max_length=512), log=lambda line: None
    )
    for pair in recorded:
        ours = store[pair["line"]]
        np.testing.assert_array_equal(ours.chosen, pair["chosen_input_ids"])
        np.testing.assert_array_equal(ours.rejected, pair["rejected_input_ids"])
    assert len(recorded) == 16
