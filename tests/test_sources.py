"""Every kind of source gives the same records; bad ones are named with file and line."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from toy_tokenizer import write_pairs

from easyrm.data import sources
from easyrm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    plain = write_pairs(tmp_path / "b.jsonl", 5)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=2)
    (tmp_path / "notes.txt").write_text("not data")
    return tmp_path


def values(spec):
    return [record.value for record in sources.read(str(spec))]


def test_all_kinds_hold_the_same_records(folder):
    expected = [json.loads(line) for line in (folder / "b.jsonl").read_text().splitlines()]
    for name in ("a.jsonl.gz", "b.jsonl", "c.parquet"):
        assert values(folder / name) == expected
    assert values(folder) == 3 * expected
    assert values(folder / "*.jsonl*") == 2 * expected
    assert values(f"{folder / 'c.parquet'}, {folder / 'b.jsonl'}") == 2 * expected
    lines = [record.where for record in sources.read(str(folder))]
    assert lines == [f"{folder / name}:{i}" for name in ("a.jsonl.gz", "b.jsonl", "c.parquet") for i in range(1, 6)]


def test_relative_names_and_nested_globs(folder, monkeypatch):
    (folder / "deep").mkdir()
    os.link(folder / "b.jsonl", folder / "deep/d.jsonl")
    monkeypatch.chdir(folder)
    assert sources.resolve("b.jsonl,deep,**/d*.jsonl") == ["b.jsonl", "deep/d.jsonl", "deep/d.jsonl"]


def test_hub_name_reads_through_datasets(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "data").mkdir()
    os.link(folder / "c.parquet", folder / "data/test-00000.parquet")
    records = list(sources.read(f"hf://{folder / 'data'}:test"))
    assert [record.value["id"] for record in records] == list(range(5))
    assert records[4].where == f"hf://{folder / 'data'}:test:5"
    with pytest.raises(InputError, match=r"hf://dataset\[:split\]"):
        list(sources.read(f"hf://{folder / 'data'}:absent"))


def test_a_bad_line_is_a_record_with_its_place(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n\n{"a": \n\xff\xfe\n[2]\n')
    records = list(sources.read(str(tmp_path / "x.jsonl")))
    assert [(record.line, record.value, record.error is None) for record in records] == [
        (1, {"a": 1}, True),
        (3, None, False),
        (4, None, False),
        (5, [2], True),
    ]
    assert records[1].where.endswith("x.jsonl:3") and records[1].error.startswith("not JSON")


def test_missing_sources_are_refused_before_anything_is_read(folder):
    empty = folder / "empty"
    empty.mkdir()
    for spec, message in [
        (f"{folder / 'b.jsonl'},{folder / 'absent.jsonl'}", r"absent.jsonl: no such file"),
        (folder / "*.csv", "matches no file"),
        (empty, "holds no file ending in"),
        (" , ", "no data given"),
    ]:
        with pytest.raises(InputError, match=message):
            sources.read(str(spec))


def test_corrupted_files_are_named(folder):
    whole = (folder / "a.jsonl.gz").read_bytes()
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) - 20])
    with pytest.raises(InputError, match=r"a.jsonl.gz: corrupted after line"):
        values(folder / "a.jsonl.gz")
    (folder / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"c.parquet: corrupted after row 0"):
        values(folder / "c.parquet")


def test_reading_is_lazy(tmp_path):
    """The first records are there before a later file is opened."""
    first = write_pairs(tmp_path / "a.jsonl", 2)
    later = write_pairs(tmp_path / "b.jsonl", 2)
    records = sources.read(f"{first},{later}")
    next(records)
    later.unlink()
    next(records)
    with pytest.raises(FileNotFoundError):
        next(records)
