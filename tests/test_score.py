"""easyrm.score and easyrm.convert: one line out for each line in, the same rewards from a run and from its export."""

import json

import numpy as np
import pytest
from etils import epath
from runs import call, lines_of, make_pairs, make_tokenizer, make_world, run, write_lines

from easyrm.data.config import DataConfig
from easyrm.data.store import build_store
from easyrm.data.tokenizer import load_tokenizer
from easyrm.score import write_scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    settings = {**make_world(folder), "total_steps": 3, "save_freq": 2, "output_dir": str(folder / "run")}
    run(settings)
    return folder / "run"


def scores(folder, model, lines, **more):
    write_lines(folder / "in.jsonl", lines)
    settings = {"model": model, "input": folder / "in.jsonl", "output": folder / "out.jsonl", "dtype": "fp32", **more}
    result = call("score", settings)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], result.stdout


def test_pairs_conversations_and_what_cannot_be_scored(trained, tmp_path):
    pairs = make_pairs(9, seed=3)
    single = {"messages": pairs[0]["chosen"], "id": 17}
    same = {"chosen": pairs[1]["chosen"], "rejected": pairs[1]["chosen"], "id": ["\ud800", {"deep": None}]}
    long = {"messages": [{"role": "user", "content": "ant"}, {"role": "assistant", "content": "bee " * 900}]}
    lines = [*pairs, single, "{torn", same, long, {"id": "x", "chosen": []}]
    out, said = scores(tmp_path, trained, lines)
    assert len(out) == len(lines)
    for line, pair in zip(out[:9], pairs, strict=True):
        assert list(line) == ["id", "chosen", "rejected"] and line["id"] == pair["id"]
    assert out[9] == {"id": 17, "reward": pytest.approx(out[0]["chosen"], abs=1e-5)}
    assert out[11]["chosen"] == out[11]["rejected"] and out[11]["id"] == same["id"]
    assert "not JSON" in out[10]["error"] and "overlong" in out[12]["error"] and out[13]["id"] == "x"
    assert "10 pairs, 1 conversations, 3 errors" in said
    one_by_one, _ = scores(tmp_path, trained, lines[:9], batch_size=1)
    np.testing.assert_allclose([x["chosen"] for x in one_by_one], [x["chosen"] for x in out[:9]], atol=1e-5)


def test_checkpoint_and_export_give_the_same_rewards(trained, tmp_path):
    pairs = make_pairs(6, seed=4)
    result = call("convert", {"checkpoint": trained, "output": tmp_path / "hf", "dtype": "fp32"})
    assert result.returncode == 0, result.stderr
    assert "restored step 3 of 3" in result.stdout
    from_run, _ = scores(tmp_path, trained, pairs)
    from_export, _ = scores(tmp_path, tmp_path / "hf", pairs)
    assert from_run == from_export
    earlier, _ = scores(tmp_path, trained / "checkpoints" / "2", pairs)
    assert earlier != from_run
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{lines_of(trained)[-1]['loss']}" in card and "| optimizer.lr | 0.001 |" in card
    rounded = call("convert", {"checkpoint": trained / "checkpoints" / "3", "output": tmp_path / "bf16"})
    assert rounded.returncode == 0
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_refusals(trained, tmp_path, shared):
    def check(module, settings, match):
        result = call(module, settings)
        assert result.returncode == 2 and match in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr

    there = {"input": trained / "config.json", "output": tmp_path / "o"}
    check("score", {"model": "", **there}, "--model is empty")
    check("score", {"model": tmp_path / "nothing", **there}, "no such model")
    check("score", {"model": shared / "checkpoints" / "stories260K", **there}, "without a score head")
    check(
        "convert",
        {"checkpoint": trained / "checkpoints" / "1", "output": tmp_path / "o"},
        "has no step 1; complete steps are [2, 3]",
    )
    check("convert", {"checkpoint": tmp_path, "output": tmp_path / "o"}, "no such file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    check("convert", {"checkpoint": trained, "output": tmp_path / "full"}, "not empty")


def test_what_is_read_once_is_scored(tmp_path):
    """A file that is replaced after it was read changes no line: rewards, ids and reasons are of one reading."""
    make_tokenizer(tmp_path / "tokenizer.model")
    path = write_lines(tmp_path / "in.jsonl", [make_pairs(1)[0], "{torn", {"messages": make_pairs(1)[0]["chosen"]}])
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    store = build_store(str(path), tokenizer, DataConfig(max_bad_fraction=1.0), scoring=True, log=lambda line: None)
    write_lines(path, ["{other"] * 9)
    counts = write_scores(store.outcomes, iter([(1.0, 0.5), (2.0, 2.0)]), epath.Path(tmp_path / "out.jsonl"))
    assert counts == {"pairs": 1, "errors": 1, "conversations": 1}
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [out[0], out[2]] == [{"id": "pair-0", "chosen": 1.0, "rejected": 0.5}, {"reward": 2.0}]
    assert list(out[1]) == ["error"] and "not JSON" in out[1]["error"]
