"""Records of each suite are read as they are, those of another suite or with faults are not, and files are found."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyrm.data.pairs import Dropped
from easyrm.data.readers import Record
from easyrm.errors import InputError
from easyrm.suites import pairs, rewardbench, rewardbench2, rm_bench
from easyrm.suites.registry import SUITES, parse_suites


def talk(answer):
    return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]


RECORDS = {
    "pairs": {"id": "p", "chosen": talk("a"), "rejected": talk("b")},
    "rewardbench": {"id": 7, "prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "hep-go"},
    "rewardbench2": {
        "id": "tied:3",
        "prompt": "Why?",
        "chosen": ["a", "b"],
        "rejected": ["c"],
        "num_correct": 2,
        "total_completions": 3,
        "subset": "Ties",
    },
    "rm-bench": {"prompt": "Why?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "safety-refuse"},
}


def record(value):
    return Record("eval.jsonl", 3, value)


def test_records():
    chosen, rejected = (talk("a"),), (talk("b"),)
    where = "eval.jsonl:3"
    assert pairs.parse(record(RECORDS["pairs"])) == ('"p"', "", chosen, rejected, where)
    assert pairs.parse(record(RECORDS["pairs"] | {"subset": "s"})).subset == "s"
    assert rewardbench.parse(record(RECORDS["rewardbench"])) == ("7", "hep-go", chosen, rejected, where)
    whole = RECORDS["pairs"] | {"subset": "donotanswer"}
    assert rewardbench.parse(record(whole)) == ('"p"', "donotanswer", chosen, rejected, where)
    two = rewardbench2.parse(record(RECORDS["rewardbench2"]))
    assert two == ('"tied:3"', "Ties", (talk("a"), talk("b")), (talk("c"),), where)
    three = rm_bench.parse(record(RECORDS["rm-bench"]))
    assert three == (None, "safety-refuse", tuple(map(talk, "abc")), tuple(map(talk, "def")), where)


@pytest.mark.parametrize("suite, other", list(itertools.permutations(RECORDS, 2)))
def test_the_file_of_another_suite(suite, other):
    with pytest.raises(InputError) as raised:
        SUITES[suite].parse(record(RECORDS[other]))
    message = str(raised.value)
    assert re.fullmatch(rf"eval.jsonl:3: {suite} has the columns .*; found .*; write {other}:eval.jsonl", message)
    assert all(repr(column) in message for column in RECORDS[other])


@pytest.mark.parametrize("suite", ["rewardbench", "rewardbench2", "rm-bench"])
def test_unknown_columns(suite):
    value = {f"column\n{number}": 0 for number in range(100)}
    with pytest.raises(InputError, match=rf"^eval.jsonl:3: {suite} has [^\n]{{,500}}; give a file of {suite}$"):
        SUITES[suite].parse(record(value))


@pytest.mark.parametrize(
    "suite, change, message",
    [
        ("rewardbench", {"subset": "hep-basic"}, "'hep-basic' is none of RewardBench's 23"),
        ("rewardbench2", {"subset": "Maths"}, "'Maths' is none of RewardBench 2's: Factuality,"),
        ("rm-bench", {"domain": "safety"}, "'safety' is none of RM-Bench's: chat,"),
    ],
)
def test_unknown_subset(suite, change, message):
    with pytest.raises(InputError, match=f"^eval.jsonl:3: .*{message}"):
        SUITES[suite].parse(record(RECORDS[suite] | change))


@pytest.mark.parametrize(
    "suite, change, reason",
    [
        ("pairs", {"chosen": "a"}, "malformed"),
        ("pairs", {"rejected": None}, "malformed"),
        ("pairs", {"subset": ["a"]}, "malformed"),
        ("pairs", {"chosen": []}, "empty"),
        ("rewardbench", {"chosen": None}, "malformed"),
        ("rewardbench", {"prompt": ["Why?"]}, "malformed"),
        ("rewardbench", {"chosen": " "}, "empty"),
        ("rewardbench", {"prompt": ""}, "empty"),
        ("rewardbench", {"subset": None}, "malformed"),
        ("rewardbench", {"rejected": "\ud800"}, "malformed"),
        ("rewardbench2", {"rejected": []}, "empty"),
        ("rewardbench2", {"rejected": ["c", 1]}, "malformed"),
        ("rewardbench2", {"num_correct": 1}, "malformed"),
        ("rewardbench2", {"total_completions": 4}, "malformed"),
        ("rewardbench2", {"subset": "Math"}, "malformed"),
        ("rewardbench2", {"id": "tied-3"}, "malformed"),
        ("rewardbench2", {"id": None}, "malformed"),
        ("rm-bench", {"chosen": ["a", "b"]}, "malformed"),
        ("rm-bench", {"rejected": ["d", "e", ""]}, "empty"),
        ("rm-bench", {"rejected": {"d": 1}}, "malformed"),
    ],
)
def test_faulty_records_are_dropped(suite, change, reason):
    with pytest.raises(Dropped) as raised:
        SUITES[suite].parse(record(RECORDS[suite] | change))
    assert raised.value.reason == reason


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_no_record_is_dropped(suite):
    for value, error in (([1], None), ("text", None), (None, "not JSON")):
        with pytest.raises(Dropped):
            SUITES[suite].parse(Record("eval.jsonl", 1, value, error))


def test_requests(tmp_path):
    file = tmp_path / "held out.v2.jsonl.gz"
    file.touch()
    spec = f" rewardbench, rm-bench:gs://b/x.json,rm-bench:{file},{file},hf://a/b:test,pairs:hf://c/b:test,gs://e/*.parquet,"
    assert parse_suites(spec, taken=["eval"]) == [
        ("rewardbench", "rewardbench", "hf://allenai/reward-bench:filtered"),
        ("rm-bench", "rm-bench", "gs://b/x.json"),
        ("rm-bench-2", "rm-bench", str(file)),
        ("held-out.v2", "pairs", str(file)),
        ("b-test", "pairs", "hf://a/b:test"),
        ("b-test-2", "pairs", "hf://c/b:test"),
        ("pairs", "pairs", "gs://e/*.parquet"),
    ]
    assert parse_suites("hf://a/Eval,hf://a/eval", taken=["eval"])[1].name == "eval-3"
    assert parse_suites(" ,") == []


def test_a_colon_may_be_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b.jsonl").touch()
    assert parse_suites("a:b.jsonl") == [("a-b", "pairs", "a:b.jsonl")]


@pytest.mark.parametrize("spec", ["rewardbnch", "rewardbnch:eval.jsonl", "absent.jsonl"])
def test_neither_suite_nor_file(spec):
    with pytest.raises(InputError, match=rf"^evaluation {spec}: neither a suite \(pairs, .*rm-bench\) nor a file"):
        parse_suites(spec)


@pytest.mark.parametrize("spec", ["pairs", "rm-bench:", "pairs:"])
def test_no_source(spec):
    with pytest.raises(InputError, match=r"no file is named; write (pairs|rm-bench):FILE$"):
        parse_suites(spec)


@given(st.lists(st.text(st.characters(exclude_characters=",*?["), min_size=1, max_size=300), max_size=4))
def test_names_are_unique_and_fit_for_files(parts):
    requests = parse_suites(",".join(f"hf://x/{part}" for part in parts))
    names = [request.name for request in requests]
    assert len({name.casefold() for name in names}) == len(requests) == len(parts)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,110}", name) for name in names)
