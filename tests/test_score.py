"""easyrm.score and easyrm.convert: one line out for each line in, the same rewards from a run and from its export."""

import json
import statistics
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from runs import call, lines_of, make_pairs, make_world, outputs_of, run, start_two, write_lines

from easyrm import score as command
from easyrm.data import sources
from easyrm.data.conversations import Conversation
from easyrm.data.sharing import share
from easyrm.errors import InputError
from easyrm.scoring.parts import Parts
from easyrm.scoring.scorer import open_scorer


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
    assert "wrote 14 lines" in said and all(f"{n}" in said for n in ("10 pairs", "1 conversations", "3 errors"))
    one_by_one, _ = scores(tmp_path, trained, lines[:9], batch_tokens=128)
    np.testing.assert_allclose([x["chosen"] for x in one_by_one], [x["chosen"] for x in out[:9]], atol=1e-5)


def test_a_pair_is_one_whatever_columns_it_has_beside(trained, tmp_path):
    """As train_rm takes it; null is what a column of a mixed file holds where a record has nothing there."""
    (pair, other) = make_pairs(2, seed=5)
    whole = {"messages": other["chosen"], "responses": ["a", "b"], "prompt": "c"}
    empty = {"messages": None, "responses": None, "prompt": None}
    alone = {"messages": other["chosen"], "chosen": None, "rejected": None, "responses": None}
    bare = {"prompt": "c", "chosen": pair["chosen"][-1:], "rejected": pair["rejected"][-1:]}
    out, _ = scores(tmp_path, trained, [pair, {**pair, **whole}, {**pair, **empty}, alone, empty, bare])
    values = [[line["chosen"], line["rejected"]] for line in out[:3]]
    np.testing.assert_allclose(values, [values[0]] * 3, atol=1e-5)
    assert list(out[3]) == ["reward"] and "chosen is missing" in out[4]["error"]
    assert "its prompt stands beside chosen and rejected" in out[5]["error"]


def test_what_would_be_spoilt_is_left_alone(trained, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", make_pairs(2))
    before, record = path.read_bytes(), (trained / "config.json").read_bytes()
    for settings, why in (
        ({"model": trained, "output": path}, "is the input itself; name another file"),
        ({"model": trained, "output": tmp_path / "o", "save_statistics": "true"}, "needs the directory of an export"),
    ):
        result = call("score", {"input": path, "dtype": "fp32", **settings})
        assert result.returncode == 2 and why in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert path.read_bytes() == before and (trained / "config.json").read_bytes() == record


def test_ctrl_c_is_one_line_and_the_command_goes_on(trained, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", make_pairs(2))
    settings = {"model": trained, "input": path, "output": tmp_path / "o", "dtype": "fp32"}
    interrupt = "import easyrm.score as s\ns.write_scores = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)\n"
    flags_of = [f"--{name}={value}" for name, value in settings.items()]
    program = [sys.executable, "-c", f"{interrupt}s.run_command(s.score)", *flags_of]
    result = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (130, "easyrm: interrupted\n")
    assert call("score", settings).returncode == 0
    result = call("score", {**settings, "distributed": "True"})
    assert result.returncode == 2 and "--distributed=True" in result.stderr


def test_the_model_of_a_command_is_told_by_what_it_holds(tmp_path):
    (tmp_path / "digests.json").write_text("{}")
    first = command._version(epath.Path(tmp_path), None)
    (tmp_path / "digests.json").write_text("{ }")
    assert first != command._version(epath.Path(tmp_path), None) and command._version(epath.Path(tmp_path), 7) == ["7"]
    assert command._version(epath.Path("hf://org/name"), None) == []


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


def scorer_of(trained, **more):
    return open_scorer(str(trained), mesh_dim="1,1,1", dtype="fp32", normalize=False, **more)


def candidates(n, responses, seed=5):
    """Lines of a prompt and `responses` answers, and the same as whole conversations."""
    lines, whole = [], []
    for pair in make_pairs(n, seed=seed):
        prompt, texts = pair["chosen"][:-1], [f"{pair['id']} says {word}" for word in "abcdefghij"[:responses]]
        lines.append({"prompt": prompt, "responses": texts, "id": pair["id"]})
        whole.append([{"messages": [*prompt, {"role": "assistant", "content": text}]} for text in texts])
    return lines, whole


def test_candidates_of_a_prompt_get_the_rewards_of_their_conversations(trained, tmp_path):
    lines, whole = candidates(7, 5)
    lines += [{"prompt": "ant?", "responses": ["bee", {"role": "assistant", "content": "cat"}]}]
    lines += [{"prompt": "ant?", "responses": []}, {"prompt": "ant?", "responses": ["bee", " "]}, {"responses": ["x"]}]
    out, _ = scores(tmp_path, trained, lines)
    alone, _ = scores(tmp_path, trained, [single for singles in whole for single in singles])
    for line, at in zip(out[:7], range(0, 35, 5), strict=True):
        np.testing.assert_allclose(line["rewards"], [x["reward"] for x in alone[at : at + 5]], atol=1e-5)
        assert len(set(line["rewards"])) == 5
    assert len(out[7]["rewards"]) == 2
    assert [line["error"].split(":")[0] for line in out[8:]] == ["malformed", "empty", "malformed"]


def test_a_prompt_is_computed_once_for_each_two_of_its_responses(trained):
    """The nine pairs of a 3 x 3 matrix are six conversations: each is computed once, the prompt three times."""
    scorer = scorer_of(trained)
    prompt = np.arange(10, 60, dtype=np.int32)
    sides = [np.concatenate([prompt, np.full(7 + i, 100 + i, np.int32)]) for i in range(6)]
    nine = [Conversation("p", side) for i in range(3) for j in range(3) for side in (sides[i], sides[3 + j])]
    rewards = scorer.score(nine)
    assert scorer.counts["conversations"] == 18 and scorer.counts["distinct"] == 6
    assert scorer.counts["tokens_unique"] == 3 * len(prompt) + sum(len(side) - len(prompt) for side in sides)
    assert scorer.counts["tokens_computed"] < sum(map(len, sides))
    alone = [scorer.score([Conversation(i, side)])[0] for i, side in enumerate(sides)]
    expected = [alone[k] for i in range(3) for j in range(3) for k in (i, 3 + j)]
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_every_conversation_is_where_sharing_says():
    rng = np.random.default_rng(0)
    asked = [Conversation(int(p), np.array([p, *rng.integers(3, size=2)], np.int32)) for p in rng.integers(9, size=99)]
    segments, at = share(asked)
    for conversation, place in zip(asked, at, strict=True):
        segment = segments[place // 2]
        np.testing.assert_array_equal((segment.chosen, segment.rejected)[place % 2], conversation.tokens)
    distinct = {conversation.tokens.tobytes() for conversation in asked}
    assert len({segment.chosen.tobytes() for segment in segments} | {s.rejected.tobytes() for s in segments}) == len(
        distinct
    )


def test_a_stopped_command_goes_on_with_the_same_bytes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_LINES", 4)
    path = str(write_lines(tmp_path / "in.jsonl", [*make_pairs(9, seed=7), "{torn", *candidates(5, 3)[0]]))
    scorer = scorer_of(trained)

    def go_on(output, lines=None):
        parts = Parts(epath.Path(tmp_path / output), {"dtype": "fp32"})
        before = parts.count
        command.write_scores(list(sources.read(path))[before:lines], scorer, parts)
        return before, parts

    _, parts = go_on("whole.jsonl")
    parts.finish()
    assert len((tmp_path / "whole.jsonl").read_text().splitlines()) == 15
    go_on("out.jsonl", lines=8)
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl.parts" / ".000002.jsonl.unfinished").write_text('{"chosen": 1.')  # killed while writing
    before, parts = go_on("out.jsonl")
    parts.finish()
    assert before == 8
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]
    go_on("out.jsonl", lines=8)
    with pytest.raises(InputError, match=r"dtype=bf16 \(there: fp32\)"):
        Parts(epath.Path(tmp_path / "out.jsonl"), {"dtype": "bf16"})


def test_normalised_by_the_statistics_of_a_reference_file(trained, tmp_path):
    export = tmp_path / "hf"
    assert call("convert", {"checkpoint": trained, "output": export, "dtype": "fp32"}).returncode == 0
    lines = [*make_pairs(5, seed=8), *candidates(3, 3)[0], {"messages": make_pairs(1)[0]["chosen"]}, "{torn"]
    refused = call(
        "score", {"model": export, "input": trained / "config.json", "output": tmp_path / "o"}, "--normalize"
    )
    assert refused.returncode == 2 and "--save_statistics" in refused.stderr
    raw, said = scores(tmp_path, export, lines, save_statistics="true")
    values = [v for x in raw for v in (x.get("rewards") or [x[k] for k in ("chosen", "rejected", "reward") if k in x])]
    config = json.loads((export / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert config["reward_std"] == pytest.approx(statistics.pstdev(values), abs=1e-9)
    assert "kept reward_mean" in said and len(values) == 20
    normal, _ = scores(tmp_path, export, lines, normalize="true")
    wanted = (raw[0]["chosen"] - config["reward_mean"]) / config["reward_std"]
    assert normal[0]["chosen"] == pytest.approx(wanted, abs=1e-6)
    assert scores(tmp_path, export, lines)[0] == raw


@pytest.mark.parametrize("mesh_dim", ["2,2,2", "1,4,2"])
def test_any_mesh_gives_the_same_rewards(trained, mesh_dim):
    conversations = [Conversation(i // 3, np.arange(3, 40 + i, dtype=np.int32)) for i in range(30)]
    here = scorer_of(trained).score(conversations)
    there = open_scorer(str(trained), mesh_dim=mesh_dim, dtype="fp32", normalize=False).score(conversations)
    np.testing.assert_allclose(here, there, atol=1e-5)


def test_two_processes_score_together(trained, tmp_path):
    lines = [*make_pairs(9, seed=3), *candidates(3, 3)[0]]
    alone, _ = scores(tmp_path, trained, lines)
    settings = {"model": trained, "input": tmp_path / "in.jsonl", "output": tmp_path / "two.jsonl", "dtype": "fp32"}
    processes = start_two(settings, "score")
    said = outputs_of(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    together = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    for one, two in zip(alone, together, strict=True):
        assert one["id"] == two["id"]
        for key in one.keys() - {"id"}:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5)
