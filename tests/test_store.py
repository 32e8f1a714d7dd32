"""The store accounts for every record, gives back exact tokens, and does not grow with the data."""

import json
import subprocess
import sys

import numpy as np
import pytest
from toy_tokenizer import train_sentencepiece, write_pairs
from unsteady import unsteady

from easyrm.data import sources
from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.template import render
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return load_tokenizer(str(model_file))


def build(path, tokenizer, log=None, **config):
    return build_store(str(path), tokenizer, DataConfig(**config), log=(log if log is not None else []).append)


def pair(chosen, rejected, **extra):
    sides = {"chosen": chosen, "rejected": rejected}
    prompt = [{"role": "user", "content": "why"}]
    return {k: [*prompt, {"role": "assistant", "content": v}] for k, v in sides.items()} | extra


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_tokens_come_back_as_encoded(tmp_path, tokenizer):
    """More records than one chunk; sides, prompt, margin and place agree with the file read another way."""
    path = write_pairs(tmp_path / "x.jsonl", 600, margin=0.5)
    store = build(path, tokenizer)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert store.report["read"] == 600 == store.report["kept"] + sum(store.report["dropped"].values())
    tokens = unique = longest = 0
    for i in range(len(store)):
        token_pair = store[i]
        line = int(token_pair.where.rpartition(":")[2])
        texts = [render(rows[line - 1][side], "<s>", "</s>") for side in ("chosen", "rejected")]
        chosen, rejected = tokenizer.encode_batch(texts)
        assert token_pair.chosen.tolist() == chosen and token_pair.rejected.tolist() == rejected
        assert token_pair.chosen.dtype == token_pair.rejected.dtype == np.int32
        prompt = next((k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        prompt = min(len(chosen), len(rejected)) if prompt is None else prompt
        assert token_pair.prompt_length == prompt and token_pair.margin == 0.5
        np.testing.assert_array_equal(store.lengths([i]), [[len(chosen) - prompt, prompt, len(rejected) - prompt]])
        tokens, unique = tokens + len(chosen) + len(rejected), unique + len(chosen) + len(rejected) - prompt
        longest = max(longest, len(chosen), len(rejected))
    assert (store.report["tokens"], store.report["tokens_unique"]) == (tokens, unique)
    assert (store.report["longest"], store.report["without_margin"]) == (longest, 0)
    assert store.report["files"] == [str(path)]
    assert store.max_token_id < tokenizer.vocab_size


BAD = [
    "{not json\n",
    pair("yes", " yes \n"),
    pair("yes", "yes"),
    pair("yes", ""),
    {**pair("yes", "no"), "rejected": [{"role": "user", "content": "why"}]},
    pair("yes", "no " * 300),
    pair("yes", "no", margin=0),
    pair("so", "no"),
    pair("so", "no"),
    pair("so", "no", margin=1.5),
]


def test_every_drop_is_counted_and_said(tmp_path, tokenizer):
    log = []
    path = write(tmp_path / "x.jsonl", BAD)
    settings = {"max_length": 100, "max_bad_fraction": 0.5, "drop_ties": True, "drop_duplicates": True}
    store = build(path, tokenizer, log, **settings)
    assert store.report["dropped"] == {
        "malformed": 1,
        "empty": 1,
        "not_ending_in_assistant": 1,
        "identical": 2,
        "tie": 1,
        "duplicate": 2,
        "overlong": 1,
    }
    assert (store.report["read"], store.report["kept"], store.report["without_margin"]) == (10, 1, 1)
    assert np.isnan(store[0].margin)
    text = "\n".join(log)
    for place in [f"{path}:1: malformed: not JSON", f"{path}:2: identical", f"{path}:6: overlong", f"{path}:9: dupl"]:
        assert f"dropped {place}" in text
    assert "kept 1 of 10" in log[-1] and "2 identical" in log[-1]
    kept_if_not_asked = build(path, tokenizer, max_length=100, max_bad_fraction=0.5).report
    assert kept_if_not_asked["kept"] == 4


def test_only_the_first_of_many_drops_are_shown(tmp_path, tokenizer):
    log = []
    build(write(tmp_path / "x.jsonl", [pair("a", "a")] * 9 + [pair("a", "b")]), tokenizer, log)
    assert sum("identical: " in line for line in log) == 3


def test_what_stops_a_run(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", BAD)
    with pytest.raises(InputError, match=r"1 of 10 records are malformed \(10.0%\), the first at .*x.jsonl:1 "):
        build(path, tokenizer)
    with pytest.raises(InputError, match=r"x.jsonl:6: a conversation of \d+ tokens exceeds --data.max_length=200"):
        build(path, tokenizer, max_length=200, max_bad_fraction=1.0, overlong="error")
    with pytest.raises(InputError, match=r"no usable pair among 1 records \(dropped: 1 identical\)"):
        build(write(tmp_path / "y.jsonl", [pair("a", "a")]), tokenizer)
    with pytest.raises(InputError, match=r"no usable pair among 0 records"):
        build(write(tmp_path / "z.jsonl", []), tokenizer)
    tool = {**pair("a", "b"), "chosen": [{"role": "tool", "content": "a"}]}
    with pytest.raises(InputError, match=r"w.jsonl:2: chosen has the role 'tool'"):
        build(write(tmp_path / "w.jsonl", [pair("a", "b"), tool]), tokenizer)


def test_a_long_line_is_dropped_without_being_tokenized(tmp_path, tokenizer, monkeypatch):
    """Its characters prove it too long; the bound that is stated holds."""
    path = write(tmp_path / "x.jsonl", [pair("yes", "no"), pair("yes", "small green river " * 600_000)])
    encoded = []
    encode = type(tokenizer).encode_batch
    monkeypatch.setattr(
        type(tokenizer), "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    log = []
    assert build(path, tokenizer, log).report["dropped"] == {"overlong": 1}
    assert max(map(len, encoded)) < 100
    assert "x.jsonl:2: overlong: 108000" in "".join(log)
    stated = (
        r"x.jsonl:2: a conversation of 108000\d\d characters \(at least \d+ tokens\) exceeds --data.max_length=4096"
    )
    with pytest.raises(InputError, match=stated) as stopped:
        build(path, tokenizer, overlong="error")
    least = int(str(stopped.value).partition("at least ")[2].split()[0])
    assert 4096 < least <= len(encode(tokenizer, ["small green river " * 600_000])[0])


def test_what_a_tokenizer_cannot_encode_is_malformed(tmp_path, tokenizer, monkeypatch):
    """Only the pair that it refuses, wherever it stands among others."""
    path = write(tmp_path / "x.jsonl", [pair("yes", "no"), pair("cursed", "no"), pair("a", "b")])
    encode = type(tokenizer).encode_batch

    def encode_batch(self, texts):
        if any("cursed" in text for text in texts):
            raise Exception("unknown character")
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_batch", encode_batch)
    log = []
    store = build(path, tokenizer, log, max_bad_fraction=1.0)
    assert (store.report["kept"], store.report["dropped"]) == (2, {"malformed": 1})
    assert "x.jsonl:2: malformed: the tokenizer cannot encode its text (unknown character)" in "".join(log)
    assert [store[i].where for i in range(2)] == [f"{path}:1", f"{path}:3"]


def test_texts_and_margins_beyond_their_types_are_malformed(tmp_path, tokenizer):
    rows = [pair("yes", "no"), pair("yes", "\ud800"), pair("a", "b", margin=10**400), pair("a", "b", margin=1e39)]
    log = []
    store = build(write(tmp_path / "x.jsonl", rows), tokenizer, log, max_bad_fraction=1.0)
    assert (store.report["kept"], store.report["dropped"]) == (1, {"malformed": 3})
    assert "surrogates not allowed" in "".join(log) and "margin is 1e+39, not a finite number of 32 bits" in "".join(
        log
    )


def test_retries_are_counted(tmp_path, tokenizer, monkeypatch):
    log, path = [], write_pairs(tmp_path / "x.jsonl", 3)
    assert "retries" not in build(path, tokenizer).report
    pause = unsteady(monkeypatch, fail_at=[0, 1])
    whole = build(path, tokenizer, log)
    assert whole.report["retries"] == len(pause) == 2 and whole.report["read"] == 3
    assert "cannot be read (late); try 2 of 5 in 1 s" in log[0]


def test_fingerprint_is_of_tokens_and_margins(tmp_path, tokenizer):
    def of(*rows):
        return build(write(tmp_path / "x.jsonl", rows), tokenizer).fingerprint

    base = of(pair("yes", "no"), pair("a", "b", margin=1))
    assert base == of(pair("yes ", "no", id=3), pair("c", "c"), pair("a", "b", margin=1.0))
    others = [
        of(pair("yes", "no"), pair("a", "b", margin=2)),
        of(pair("yes", "no"), pair("a", "b")),
        of(pair("no", "yes"), pair("a", "b", margin=1)),
        of(pair("a", "b", margin=1), pair("yes", "no")),
    ]
    assert len({base, *others}) == 5


MEASURE = """
import re, sys
from pathlib import Path
from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
store = build_store(sys.argv[2], tokenizer, DataConfig(), log=lambda line: None)
print(len(store), store.report["tokens_unique"], sum(len(store[i].chosen) for i in range(len(store))))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])  # not the parent's, as ru_maxrss
"""


def test_memory_does_not_grow_with_the_data(tmp_path, model_file):
    def peak(n):
        path = write_pairs(tmp_path / f"{n}.jsonl", n, words=150)
        command = [sys.executable, "-c", MEASURE, str(model_file), str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        kept, unique, _ = map(int, lines[0].split())
        assert kept == n
        return int(lines[1]) * 1024, 4 * unique

    small, small_bytes = peak(600)
    large, large_bytes = peak(6000)
    assert large - small < (large_bytes - small_bytes) / 3


def test_real_pairs_are_all_accounted_for(shared):
    spec = str(shared / "data/hh_train.jsonl.gz")
    log = []
    store = build_store(
        spec, load_tokenizer(str(shared / "tokenizers/llama2")), DataConfig(max_length=512), log=log.append
    )
    assert store.report["read"] == sum(1 for _ in sources.read(spec)) == 4408
    assert store.report["kept"] + sum(store.report["dropped"].values()) == 4408
    assert store.report["longest"] <= 512


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("max_length", 0, "use 1 or more"),
        ("batch_size", -1, "use 1 or more"),
        ("row_length", 4095, "multiple of 8"),
        ("micro_batches", 65, "at most one micro-batch a pair"),
        ("overlong", "cut", "use drop or error"),
        ("max_bad_fraction", 1.5, "use 0 to 1"),
    ],
)
def test_impossible_settings_are_named(field, value, way_out):
    DataConfig().validate()
    with pytest.raises(InputError, match=f"--data.{field}={value} .*{way_out}"):
        DataConfig(**{field: value}).validate()
