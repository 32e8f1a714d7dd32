"""Records of ranked responses: what is read, kept, dropped and given back."""

import hashlib
import json

import numpy as np
import pytest
from runs import make_pairs, make_tokenizer, write_lines

from easyrm.data import pairs
from easyrm.data.config import DataConfig
from easyrm.data.groups import parse_group
from easyrm.data.packing import group_lengths
from easyrm.data.pairs import Dropped
from easyrm.data.readers import Record
from easyrm.data.store import build_store
from easyrm.data.template import render
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError


def record(value, error=None):
    return Record("some.jsonl", 7, value, error)


def said(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": "Why?", "responses": ["a cat", said("a dog"), "an owl"]}
ASKED = {"role": "user", "content": "Why?"}


def test_a_good_group():
    group = parse_group(record({**GOOD, "id": 3}))
    assert group == (tuple([ASKED, said(text)] for text in ("a cat", "a dog", "an owl")), (0, 1, 2))
    messages = [{"role": "system", "content": "Be brief."}, ASKED]
    assert parse_group(record({**GOOD, "prompt": messages})).responses[2] == [*messages, said("an owl")]
    assert parse_group(record({**GOOD, "ranks": [9, -4, 9]})).ranks == (1, 0, 1)
    assert parse_group(record({**GOOD, "ranks": None})).ranks == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"responses": ["yes"]}, "malformed", "1 responses; a group has 2 to 16"),
        ({"responses": [str(i) for i in range(17)]}, "malformed", "17 responses"),
        ({"responses": "yes"}, "malformed", "responses is not a list"),
        ({"responses": ["yes", 3]}, "malformed", "without a role and a content"),
        ({"responses": ["yes", {"role": "user", "content": "no"}]}, "not_ending_in_assistant", "responses[1] ends in"),
        ({"responses": ["yes", " "]}, "empty", "without text"),
        ({"prompt": None}, "malformed", "without a prompt"),
        ({"prompt": ""}, "empty", "without text"),
        ({"ranks": [1, 2]}, "malformed", "ranks is not a list of 3 integers"),
        ({"ranks": [1, 2, 2.5]}, "malformed", "ranks is not a list of 3 integers"),
        ({"ranks": [1, 2, True]}, "malformed", "ranks is not a list of 3 integers"),
        ({"ranks": "012"}, "malformed", "ranks is not a list of 3 integers"),
        ({"ranks": [5, 5, 5]}, "tie", "all responses have the same rank"),
    ],
)
def test_reasons(changes, reason, detail):
    with pytest.raises(Dropped) as dropped:
        parse_group(record({**GOOD, **changes}))
    assert dropped.value.reason == reason and reason in pairs.REASONS
    assert detail in dropped.value.detail


def test_an_unknown_role_is_the_users_to_mend():
    with pytest.raises(InputError, match=r"some.jsonl:7: responses\[0\] has the role 'tool'"):
        parse_group(record({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(make_tokenizer(tmp_path_factory.mktemp("groups") / "tokenizer.model")))


def build(path, lines, tokenizer, log=None, **config):
    write_lines(path, lines)
    ranked = config.pop("ranked", True)
    said = (log if log is not None else []).append
    return build_store(str(path), tokenizer, DataConfig(**config), ranked=ranked, log=said)


def test_groups_come_back_as_encoded(tmp_path, tokenizer):
    """Of any size, among pairs, and each response once."""
    (pair,) = make_pairs(1)
    lines = [GOOD, pair, {**GOOD, "responses": ["one", "two", "three", "four"], "ranks": [1, 0, 1, 0]}]
    store = build(tmp_path / "x.jsonl", lines, tokenizer)
    assert len(store) == 3 and store.width == 2 and store.report["kept"] == store.report["read"] == 3
    expected = [*[parse_group(record(lines[i])) for i in (0, 2)]]
    expected.insert(1, ((pair["chosen"], pair["rejected"]), (0, 1)))
    tokens = 0
    for i, (responses, ranks) in enumerate(expected):
        units = store.group(i)
        found = [(side, rank) for unit in units for side, rank in zip(unit[:2], unit.ranks, strict=True) if rank >= 0]
        ids = tokenizer.encode_batch([render(response, "<s>", "</s>") for response in responses])
        assert [side.tolist() for side, _ in found] == ids and [rank for _, rank in found] == list(ranks)
        assert all(unit.where == store[i].where == f"{tmp_path}/x.jsonl:{i + 1}" for unit in units)
        tokens += sum(map(len, ids))
    odd = store.group(0)[1]
    assert (
        odd.ranks == (2, -1) and odd.chosen.tolist() == odd.rejected.tolist() and odd.prompt_length == len(odd.chosen)
    )
    lengths = store.lengths(np.arange(3))
    np.testing.assert_array_equal(lengths, group_lengths([store.group(i) for i in range(3)], 2))
    assert (store.report["tokens"], store.report["tokens_unique"]) == (tokens, lengths.sum())
    np.testing.assert_array_equal(store.lengths([2, 0]), lengths[[2, 0]])


def test_every_drop_is_counted(tmp_path, tokenizer):
    log = []
    lines = [
        GOOD,
        GOOD,
        {**GOOD, "responses": ["one", "two", " one"]},
        {**GOOD, "responses": ["one", "two", " one"], "ranks": [0, 1, 0]},
        {**GOOD, "responses": ["one", "two", "no " * 300]},
        {**GOOD, "ranks": [1, 1, 1]},
    ]
    store = build(tmp_path / "x.jsonl", lines, tokenizer, log, max_length=100, drop_duplicates=True)
    assert store.report["dropped"] == {"identical": 1, "tie": 1, "duplicate": 1, "overlong": 1}
    assert len(store) == 2
    assert "x.jsonl:3: identical: two responses of different rank have the same tokens" in "\n".join(log)


def test_ranked_responses_are_no_pairs(tmp_path, tokenizer):
    """They stop a run that expects pairs; a pair may have a column of that name."""
    (pair,) = make_pairs(1)
    with pytest.raises(InputError, match=r"x.jsonl:2: ranked responses .*type=all_pairs or --loss.type=plackett_luce"):
        build(tmp_path / "x.jsonl", [pair, GOOD], tokenizer, ranked=False)
    for ranked in (False, True):
        store = build(tmp_path / "x.jsonl", [{**pair, "responses": ["x", "y", "z"]}], tokenizer, ranked=ranked)
        assert len(store) == 1 and store.report["dropped"] == {} and store.width == ranked


def test_fingerprints(tmp_path, tokenizer):
    """Of pairs without a probability what they always were; ranks, grouping and probabilities count."""

    def of(*lines, ranked=True):
        return build(tmp_path / "x.jsonl", lines, tokenizer, ranked=ranked).fingerprint

    lines, digest = make_pairs(5, margin=lambda i: i / 2), hashlib.sha256()
    for line in lines:
        chosen, rejected = tokenizer.encode_batch(
            [render(line[side], "<s>", "</s>") for side in ("chosen", "rejected")]
        )
        prompt = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        digest.update(np.uint32([len(chosen), len(rejected), prompt]).tobytes() + np.float32(line["margin"]).tobytes())
        digest.update(np.uint32(chosen + rejected[prompt:]).tobytes())
    assert of(*lines, ranked=False) == of(*lines) == digest.hexdigest()

    two = [{**GOOD, "responses": ["one", "two"]}, {**GOOD, "responses": ["three", "four"]}]
    four = {**GOOD, "responses": ["one", "two", "three", "four"]}
    different = [
        of(*two),
        of({**two[0], "ranks": [1, 0]}, two[1]),
        of(four),
        of({**four, "ranks": [0, 1, 0, 1]}),
        of({**four, "ranks": [0, 1, 1, 1]}),
        *(of({**lines[0], **extra}) for extra in ({}, {"probability": 0.5}, {"probability": 1})),
    ]
    assert len(set(different)) == len(different)
    assert of({**four, "ranks": [2, 5, 7, 9]}) == of(four)


@pytest.mark.parametrize("value", ["1", True, -0.1, 1.1, float("nan"), float("inf"), [0.5], 10**400])
def test_a_probability_that_is_none_is_malformed(tmp_path, tokenizer, value):
    lines = [{**pair, "probability": p} for pair, p in zip(make_pairs(4), (value, 0, 0.25, None), strict=True)]
    log = []
    store = build(tmp_path / "x.jsonl", lines, tokenizer, log, ranked=False, max_bad_fraction=1.0)
    assert store.report["dropped"] == {"malformed": 1} and store.report["without_probability"] == 1
    assert "probability is" in log[0] and "not a number in [0, 1]" in log[0]
    assert [store[i].probability for i in range(2)] == [0, 0.25] and np.isnan(store[2].probability)
    json.dumps(store.report)
