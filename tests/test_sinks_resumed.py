"""What TensorBoard and Weights & Biases, the real libraries, keep of a run that goes on from before its last line."""

import contextlib
import json
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from etils import epath
from runs import lines_of

from easyrm.config import RunConfig
from easyrm.errors import InputError, Unavailable
from easyrm.training.metrics import open_metrics
from easyrm.training.progress import START, Progress

RECORD = {"config": {"seed": 1}, "total_steps": 7}
RESUMES = [Progress(3, 12), Progress(4, 16, pending_eval=True), Progress(5, 20)]


def write(folder, config, start, last, loss):
    """The lines that training would write after `start`: one a step, an evaluation each second step."""
    with open_metrics(config, epath.Path(folder), RECORD, start) as log:
        write_to(log, start, last, loss)


def write_to(log, start, last, loss):
    shown = {"accuracy": 0.5, "margin": 0.1, "learning_rate": 1e-3, "pairs_per_second": 1.0, "step_time": 1.0}
    if start.pending_eval:
        log.write({"step": start.step, "eval/loss": loss})
    for step in range(start.step + 1, last + 1):
        log.write({"step": step, "loss": loss + step, **shown})
        if step % 2 == 0 and not (start == START and step == 4):  # that one is the evaluation that was cut short
            log.write({"step": step, "eval/loss": loss})


def first_of(start):
    """The first step that is written after `start`."""
    return start.step + (not start.pending_eval)


def values_of(folder):
    return {(line["step"], key): value for line in lines_of(folder) for key, value in line.items() if key != "step"}


@pytest.mark.parametrize("start", RESUMES)
def test_tensorboard_shows_each_step_once(tmp_path, start):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is absent")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, RunConfig(tensorboard=True), START, 5, 1.0)
    time.sleep(1.1)  # the file is named after the second, and no process restarts within one
    write(tmp_path, RunConfig(tensorboard=True), start, 7, 2.0)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [((e.step, tag), e.value) for tag in events.Tags()["scalars"] if tag != "step" for e in events.Scalars(tag)]
    assert dict(found) == pytest.approx(values_of(tmp_path), rel=1e-6)
    assert len(found) == len(dict(found))


@pytest.mark.parametrize("start", [START, *RESUMES])
def test_wandb_loses_no_line(tmp_path, monkeypatch, start):
    """One process writes both parts, so that wandb knows the steps it has seen, as its server would tell."""
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is absent")
    from test_sinks import wandb_records
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads its environment once
    run = tmp_path / "run"
    run.mkdir()
    with contextlib.ExitStack() as open_logs:  # while the first is open, wandb goes on with its run
        for begin, last, loss, before in ((START, 5, 1.0, 0), (start, 7, 2.0, 6)):
            log = open_logs.enter_context(open_metrics(RunConfig(wandb_project="p"), epath.Path(run), RECORD, begin))
            write_to(log, begin, last, loss)
            wandb.run.log({}, commit=True)  # its last row is whole, as that of a process that has ended
            assert wandb.run.step == last + 1 + max(0, before - first_of(begin))
    assert wandb.run is None
    wandb.teardown()  # ends the process that writes the file
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in wandb_records(path)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    # The later of two rows of one step is that of the resumed run.
    found = {(row["step"], key): value for row in rows for key, value in row.items() if key[0] != "_" and key != "step"}
    assert found == pytest.approx(values_of(run))
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


@pytest.mark.parametrize(("name", "kind"), [("UsageError", InputError), ("CommError", Unavailable)])
def test_wandb_that_does_not_begin_is_one_line(tmp_path, monkeypatch, name, kind):
    """A missing login stays missing; a network comes back, and who starts lost runs again has to know."""
    error = type(name, (Exception,), {})("No API key configured.\nlong")
    wandb = SimpleNamespace(Settings=dict, init=Mock(side_effect=error))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(kind, match=r"--wandb_project=p: .* \(No API key configured\.\); wandb login, or set"):
        open_metrics(RunConfig(wandb_project="p"), epath.Path(tmp_path), RECORD, START)


def test_two_directories_of_one_name_are_two_runs_to_wandb(tmp_path, monkeypatch):
    """And one directory is one run, however it is named."""
    began = []
    wandb = SimpleNamespace(Settings=dict, init=lambda **options: began.append(options) or Mock(step=0))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", tmp_path / "a" / "run", "b/run"):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        with open_metrics(RunConfig(wandb_project="p"), epath.Path(folder), RECORD, START):
            pass
    ids = [options["id"] for options in began]
    assert ids[0] == ids[1] != ids[2] and {options["name"] for options in began} == {"run"}
