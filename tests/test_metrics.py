"""metrics.jsonl: every line once, whatever happens to the disk."""

import json

from runs import full_disk, lines_of

from easyrm.training.metrics import MetricsLog
from easyrm.training.progress import START, Progress


def line(step, **more):
    return {"step": step, "eval/accuracy": 0.5, **more}


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, capsys):
    with MetricsLog(tmp_path, start=START, total=9) as log:
        with full_disk(100):
            for step in range(1, 9):
                log.write(line(step))
        assert len((tmp_path / "metrics.jsonl").read_bytes()) == 100
        log.write(line(9))
    assert lines_of(tmp_path) == [line(step) for step in range(1, 10)]
    assert capsys.readouterr().out.count("warning: ") == 1


def test_lines_that_never_fit_are_said_to_be_lost(tmp_path, capsys):
    with full_disk(100), MetricsLog(tmp_path, start=START, total=9) as log:
        for step in range(1, 9):
            log.write(line(step))
    assert "the last lines of" in capsys.readouterr().out


def test_what_a_resumed_run_keeps(tmp_path, capsys):
    lines = [line(1), line(2, **{"eval/loss": 1.0}), {"step": 2, "loss": 1.0}, line(3)]
    for pending, kept in ((False, lines[:3]), (True, [lines[0], lines[2]])):
        broken = '\0\0\0\n[1]\n{"step": 4, "lo'
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + broken)
        with MetricsLog(tmp_path, start=Progress(2, 8, pending_eval=pending), total=9):
            pass
        assert lines_of(tmp_path) == kept
        assert "2 lines are not JSON objects of a step" in capsys.readouterr().out
