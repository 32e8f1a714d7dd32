"""Every kind of source gives the same records; bad ones are named with file and line."""

import gzip
import io
import json
import os
import threading

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from toy_tokenizer import write_byte_level, write_pairs
from unsteady import unsteady

from easyrm.data import readers, retry, sources
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError, Unavailable
from easyrm.scoring.evaluation import read_questions
from easyrm.suites.registry import Request


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
    with pytest.raises(InputError, match=r"b.jsonl: cannot be read .*No such file.*; check that it is there"):
        next(records)


@pytest.mark.parametrize(
    ("name", "block", "fail_at"),
    [
        ("x.jsonl.gz", 500, [0, 1, 40, 75]),
        ("x.jsonl", 500, [0, 1, 40, 75]),
        ("x.parquet", 6000, [0, 1, 50, 70]),
    ],
)
def test_reading_goes_on_where_the_storage_failed(tmp_path, monkeypatch, name, block, fail_at):
    """The records are the same and none is given twice, wherever reads fail."""
    rows = [json.loads(line) for line in write_pairs(tmp_path / "x.jsonl", 700).read_text().splitlines()]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=100, compression="none"
    )
    expected, said = list(sources.read(str(tmp_path / name))), []
    monkeypatch.setattr(readers, "_BLOCK", 1000)
    pauses = unsteady(monkeypatch, fail_at=fail_at, error=ConnectionResetError("reset"), block=block)
    assert list(sources.read(str(tmp_path / name), said.append)) == expected
    assert len(said) == len(pauses) == 4 and pauses[:3] == [1, 2, 1]
    assert all("reset" in line and f"of {retry.TRIES} in" in line for line in said)
    assert "after line" in said[2]


def test_of_a_suite_that_is_read_again_the_command_hears(tmp_path, monkeypatch, capsys):
    path = write_pairs(tmp_path / "x.jsonl", 700)
    tokenizer, said = load_tokenizer(str(write_byte_level(tmp_path / "tokenizer"))), []
    unsteady(monkeypatch, fail_at=[0, 1], block=5000)
    found = read_questions(Request("x", "pairs", str(path)), tokenizer, 512, tokenizer.vocab_size, said.append)
    assert found.read == 700 and len(said) == 3 and all("late" in line for line in said[:2])
    assert capsys.readouterr().out == ""


def test_a_storage_that_stays_silent_stops_the_run(folder, monkeypatch):
    (folder / "b.jsonl").write_text("[1]\n" * 10)
    monkeypatch.setattr(readers, "_BLOCK", 8)
    pauses = unsteady(monkeypatch, fail_at=range(3, 10**6), block=8)
    given = []
    with pytest.raises(Unavailable, match=r"b.jsonl: cannot be read after line 6, 5 tries \(late\); start again when"):
        for record in sources.read(str(folder / "b.jsonl"), [].append):
            given.append(record)
    assert [record.line for record in given] == [1, 2, 3, 4, 5, 6]
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("error", [PermissionError("denied"), FileNotFoundError("gone")])
def test_what_waiting_cannot_mend_is_not_tried_again(folder, monkeypatch, error):
    pauses = unsteady(monkeypatch, fail_at=[0], error=error)
    with pytest.raises(InputError, match=rf"b.jsonl: cannot be read \({error}\); check that it is there and may be"):
        values(folder / "b.jsonl")
    assert pauses == []


def test_damage_is_not_tried_again(folder, monkeypatch):
    pauses = unsteady(monkeypatch, fail_at=[])
    (folder / "a.jsonl.gz").write_bytes(b"no gzip")
    (folder / "c.parquet").write_bytes((folder / "c.parquet").read_bytes().replace(b"PAR1", b"PAR2"))
    for name in ("a.jsonl.gz", "c.parquet"):
        with pytest.raises(InputError, match=rf"{name}: corrupted after (line|row) 0"):
            values(folder / name)
    assert pauses == []


def test_a_listing_is_tried_again(folder, monkeypatch):
    answers = iter([TimeoutError("late"), [str(folder / "b.jsonl")]])

    def late(pattern, recursive):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    pauses = []
    monkeypatch.setattr(retry, "wait", pauses.append)
    monkeypatch.setattr(sources.glob, "glob", late)
    assert sources.resolve("*.jsonl", [].append) == [str(folder / "b.jsonl")] and pauses == [1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl", "c.parquet"])
def test_a_file_that_changes_is_not_mixed(folder, name):
    """It grows, is replaced by one of the same size, or vanishes, after its first record was read."""

    def grow(path):
        with path.open("ab") as file:
            file.write(b"more")

    def replace(path):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))

    path = folder / name
    whole = path.read_bytes()
    for change, message in [
        (grow, "changed while it was read"),
        (replace, "changed while"),
        (os.unlink, "No such file"),
    ]:
        path.write_bytes(whole)
        records = sources.read(str(path))
        next(records)
        change(path)
        with pytest.raises(InputError, match=rf"{name}: .*{message}"):
            list(records)


def test_a_download_that_ends_early_is_no_end(folder, monkeypatch):
    """A storage that gives fewer bytes than the file has is asked for the rest."""
    expected = values(folder / "b.jsonl")
    whole = (folder / "b.jsonl").read_bytes()
    lengths = iter([whole.index(b"\n") + 1, len(whole)])
    pauses = unsteady(monkeypatch, fail_at=[])
    monkeypatch.setattr(type(epath.Path()), "open", lambda path, mode: io.BytesIO(whole[: next(lengths)]))
    assert values(folder / "b.jsonl") == expected and pauses == [1]


def test_a_line_too_long_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 20)
    lines = [
        b"[1]",
        b'["' + b"x" * 1000 + b'"]',
        b"[3]",
        b'["' + b"y" * 15 + b'"]',
        b'["' + b"z" * 16 + b'"]',
        b"  " * 99,
    ]
    for name, pack in [("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress)]:
        (tmp_path / name).write_bytes(pack(b"\n".join(lines)))
        records = list(sources.read(str(tmp_path / name)))
        assert [record.line for record in records] == [1, 2, 3, 4, 5, 6]
        assert [record.error is None for record in records] == [True, False, True, True, False, False]
        assert records[1].error == "a line of 1005 bytes; at most 20 are read"
        assert [records[i].value for i in (0, 2, 3)] == [[1], [3], ["y" * 15]]


def test_a_value_that_cannot_be_decoded_is_one_bad_record(tmp_path):
    text = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"a": text}), tmp_path / "x.parquet")
    records = list(sources.read(str(tmp_path / "x.parquet")))
    assert [record.value for record in records] == [{"a": "good"}, None, {"a": "fine"}]
    assert records[1].where.endswith("x.parquet:2") and records[1].error.startswith("not readable: 'utf-8' codec")


def test_hub_rows_go_on_where_the_hub_failed(folder, monkeypatch):
    rows = [{"id": i} for i in range(6)]
    failing = iter([2, 4, None])

    class Rows(list):
        def skip(self, n):
            def stream(fail):
                for i, row in enumerate(rows[n:], n):
                    if i == fail:
                        raise ConnectionError("hub is late")
                    yield row

            return stream(next(failing))

    import datasets

    pauses = []
    monkeypatch.setattr(retry, "wait", pauses.append)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    records = list(sources.read("hf://some/rows", [].append))
    assert [record.value for record in records] == rows and [record.line for record in records] == [1, 2, 3, 4, 5, 6]
    assert pauses == [1, 1]


def test_a_pipe_is_read(folder):
    os.mkfifo(folder / "pipe")
    whole = (folder / "b.jsonl").read_bytes()
    writer = threading.Thread(target=(folder / "pipe").write_bytes, args=(whole,))
    writer.start()
    assert values(folder / "pipe") == values(folder / "b.jsonl")
    writer.join()


def test_parquet_is_read_one_row_group_at_a_time(tmp_path, monkeypatch):
    table = pyarrow.table({"a": [f"{i:01000d}" for i in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100, compression="none")
    unsteady(monkeypatch, fail_at=range(4, 10**6))
    records = sources.read(str(tmp_path / "x.parquet"), lambda line: None)
    assert [next(records).value["a"] for _ in range(100)] == table["a"].to_pylist()[:100]
