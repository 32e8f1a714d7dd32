"""TensorBoard and Weights & Biases get what metrics.jsonl has: the same keys and values, also after a restart."""

import json
import os

import pytest
from runs import call, lines_of, make_world, run


def by_step(lines):
    """{(step, key): value} of lines with their steps."""
    return {(line["step"], key): value for line in lines for key, value in line.items() if key != "step"}


def settings_of(folder, **more):
    settings = make_world(folder)
    evaluated = {"data.eval": settings["data.train"], "eval_freq": 2, "eval.suites": settings["data.train"]}
    return {**settings, **evaluated, "total_steps": 4, "save_freq": 2, "output_dir": str(folder / "run"), **more}


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = by_step(run(settings_of(tmp_path, tensorboard=True)))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {(event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    found = {key: value for key, value in found.items() if key[1] != "step"}
    assert found.keys() == lines.keys()
    for key, value in lines.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-12)


def wandb_records(path):
    """The records of a .wandb file: a log as LevelDB's, in blocks of 32 KiB, after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no record begins so close to the end of a block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_lines(folder):
    """{(step, key): value} of all offline runs under `folder`, the later ones over the former, and their ids."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = json.loads(items["step"])
                found |= {(step, key): json.loads(value) for key, value in items.items() if not key.startswith("_")}
    return found, ids


def test_wandb_holds_what_metrics_jsonl_holds_also_after_a_restart(tmp_path):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    settings = settings_of(tmp_path, wandb_project="rewards")
    for more in ({}, {"total_steps": 6, "allow_config_change": "true"}):
        done = call("train_rm", settings | more, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
    found, ids = wandb_lines(tmp_path)
    for key, value in by_step(lines_of(tmp_path / "run")).items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert len(ids) == 1
