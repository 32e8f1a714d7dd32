"""Whatever stands in a file, the reader raises nothing but InputError, and read = kept + dropped."""

import gzip
import io
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import make_pairs, make_tokenizer
from toy_tokenizer import write_byte_level

from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.template import ROLES, render
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError

GOOD = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}

fuzz = settings(deadline=None, max_examples=100, derandomize=True, database=None)


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        return load_tokenizer(str(make_tokenizer(folder / "tokenizer.model")))
    return load_tokenizer(str(write_byte_level(folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def check(path, tokenizer, content, ranked=False, **config):
    """Writes the file and builds its store; returns it (None: refused)."""
    path.write_bytes(content)
    log = []
    config = DataConfig(**{"max_bad_fraction": 1.0, "max_length": 64, **config})
    try:
        store = build_store(str(path), tokenizer, config, ranked=ranked, log=log.append)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return None
    finally:
        "".join(log).encode()  # what is said can be printed
    report = store.report
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) and report["kept"] == len(store)
    for pair in (unit for i in range(len(store)) for unit in (store.group(i) if ranked else [store[i]])):
        assert 0 < max(len(pair.chosen), len(pair.rejected)) <= config.max_length
        assert max(pair.chosen.max(), pair.rejected.max()) < tokenizer.vocab_size and not math.isinf(pair.margin)
    return store


# Any character, lone surrogates too, as JSON can hold them.
text = st.text(st.characters(), max_size=40) | st.sampled_from(["yes", " ", "</s>", "<s><unk>", "\ud800", "\0", "▁"])
number = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 3.5e38, 0, True])
json_values = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
role = st.sampled_from(ROLES)
messages = st.lists(st.fixed_dictionaries({"role": role, "content": text}), max_size=2)
conversation = st.builds(lambda first, last: [*first, {"role": "assistant", "content": f"{last}."}], messages, text)
good = text.map(lambda content: [{"role": "assistant", "content": f"{content}."}])
side = st.one_of(good, good, good, conversation, messages, json_values)  # mostly what is kept
extra = {
    "id": json_values,
    "margin": st.one_of(number, number, json_values),
    "probability": number,
    "subset": json_values,
}
pair = st.fixed_dictionaries({"chosen": side, "rejected": side}, optional=extra)
response = text | text.map(lambda content: {"role": "assistant", "content": content}) | json_values
group = st.fixed_dictionaries(
    {"prompt": text | messages | json_values, "responses": st.lists(response, max_size=5) | json_values},
    optional={**extra, "ranks": st.lists(st.integers(0, 3) | number, max_size=5) | json_values},
)
whole = "".join(json.dumps(pair) + "\n" for pair in make_pairs(30)).encode()
parquet = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_pairs(30)), parquet, row_group_size=10)


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@st.composite
def damaged(draw, content):
    """Some bytes of `content` replaced, and perhaps its end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@fuzz
@given(content=st.binary(max_size=300) | damaged(whole))
def test_any_bytes(folder, tokenizer, content):
    for name, packed in [("x.jsonl", content), ("y.jsonl.gz", gzip.compress(content)), ("z.jsonl.gz", content)]:
        check(folder / name, tokenizer, packed)


@fuzz
@given(content=damaged(gzip.compress(whole)))
def test_any_gzip(folder, tokenizer, content):
    check(folder / "x.jsonl.gz", tokenizer, content)


@fuzz
@given(content=st.binary(max_size=300) | damaged(parquet.getvalue()))
def test_any_parquet(folder, tokenizer, content):
    check(folder / "x.parquet", tokenizer, content)


@fuzz
@given(values=st.lists(json_values | pair, max_size=6))
@example(values=[[]])
@example(values=[{"chosen": 1, "rejected": None}])
def test_any_json(folder, tokenizer, values):
    store = check(folder / "x.jsonl", tokenizer, lines(values))
    assert store is None or store.report["read"] == len(values)


@fuzz
@given(values=st.lists(pair, min_size=1, max_size=6), duplicates=st.booleans(), ties=st.booleans())
def test_any_pairs(folder, tokenizer, values, duplicates, ties):
    """Among them one that is good, so that what is kept is looked at."""
    values = [*values, GOOD]
    store = check(folder / "x.jsonl", tokenizer, lines(values), drop_duplicates=duplicates, drop_ties=ties)
    assert store is not None and store.report["read"] == len(values)


@fuzz
@given(values=st.lists(group | pair, min_size=1, max_size=6), duplicates=st.booleans())
def test_any_groups(folder, tokenizer, values, duplicates):
    values = [*values, {"prompt": "why", "responses": ["yes", "no", "so"]}]
    store = check(folder / "x.jsonl", tokenizer, lines(values), ranked=True, drop_duplicates=duplicates)
    assert store is not None and store.report["read"] == len(values)


@fuzz
@given(value=pair, role=text)
def test_any_role(folder, tokenizer, value, role):
    """An unknown one stops the run, in one line."""
    value = {**value, "chosen": [{"role": role, "content": "yes"}]}
    store = check(folder / "x.jsonl", tokenizer, lines([value, GOOD]))
    assert (store is None) == (role not in ROLES)


@fuzz
@given(
    value=st.lists(st.binary(max_size=9), min_size=1, max_size=9), margins=st.lists(st.floats(), min_size=9, max_size=9)
)
def test_any_text_of_parquet(folder, tokenizer, value, margins):
    """A row whose text is not UTF-8 is one malformed record."""
    contents = pyarrow.array(value, pyarrow.binary()).view(pyarrow.string())
    message = pyarrow.StructArray.from_arrays(
        [pyarrow.array(["assistant"] * len(value)), contents], names=["role", "content"]
    )
    side = pyarrow.ListArray.from_arrays(list(range(len(value) + 1)), message)
    other = pyarrow.array([[{"role": "assistant", "content": "yes"}]] * len(value), side.type)
    table = pyarrow.table({"chosen": side, "rejected": other, "margin": margins[: len(value)], "id": value})
    pyarrow.parquet.write_table(table, folder / "whole.parquet")
    store = check(folder / "x.parquet", tokenizer, (folder / "whole.parquet").read_bytes())
    assert store is None or store.report["read"] == len(value)


@fuzz
@given(content=st.text(max_size=60) | st.lists(st.sampled_from(["<s>", "</s>", " ", "\n\n", "cat", "é"])).map("".join))
def test_the_bound_of_a_text_in_tokens_holds(tokenizer, content):
    """No text has fewer tokens than its characters prove it to have."""
    content = render([{"role": "assistant", "content": content}], tokenizer.bos, tokenizer.eos)
    assert tokenizer.longest_token * len(tokenizer.encode_batch([content])[0]) >= len(content)
    assert 0 < tokenizer.longest_token < 64


@pytest.mark.parametrize("key", ["id", "margin", "chosen", "more"])
@pytest.mark.parametrize("depth", [100, *range(900, 1000, 7), 10**5])
def test_any_depth(folder, tokenizer, depth, key):
    """What is nested as deeply as the parser of JSON just bears, and deeper."""
    deep = json.dumps({**GOOD, key: "deep"}).replace('"deep"', "[" * depth + "]" * depth)
    store = check(folder / "x.jsonl", tokenizer, f"{deep}\n".encode() + lines([GOOD]))
    assert store.report["read"] == 2
