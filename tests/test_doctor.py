"""What each check of the doctor finds by itself; test_doctor_processes.py has whole examinations."""

import contextlib
import fcntl
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from etils import epath
from runs import make_pairs, make_tokenizer, run_config, write_lines

from easyrm.errors import InputError
from easyrm.health import following, leading, sources, space, storage, table, tpu, versions
from easyrm.health.devices import slow_devices
from easyrm.health.finding import FAIL, OK, SKIPPED, WARN, Check, Finding
from easyrm.health.trial import Trial
from easyrm.models.config import SIZES

TOKEN = "hf_" + "AbCdEfGh" * 5


def test_a_check_that_hangs_crashes_or_refuses_is_a_line():
    began = time.monotonic()
    checks = [
        Check("slow", 0.3, lambda: time.sleep(60), "gs://bucket"),
        Check("broken", 5, lambda: 1 / 0),
        Check("refused", 5, lambda: refuse("--x=1: choose 2")),
        Check("fine", 5, lambda: Finding("fine", OK, "all")),
    ]
    [slow], [broken], [refused], [fine] = (check.findings() for check in checks)
    assert time.monotonic() - began < 30
    assert (slow.check, slow.state, slow.found) == ("slow", FAIL, "gs://bucket: no answer within 0.3 s")
    assert broken.state == FAIL and "ZeroDivisionError: division by zero" in broken.found
    assert (refused.state, refused.found) == (FAIL, "--x=1: choose 2") and fine.state == OK


def refuse(message):
    raise InputError(message)


def test_the_table_merges_hosts_and_keeps_to_100_columns(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    speed = [(host, Finding("output_dir", OK, "{rate} MB/s", figures={"rate": [100 + host]})) for host in (0, 1, 2, 5)]
    long = Finding("hub", FAIL, f"{'word ' * 60}{TOKEN}", "mend " * 30)
    rows = table.merge([*speed, (5, long), (0, Finding("versions", OK, "x"))])
    lines = table.as_text(rows, 6).splitlines()
    assert [row.finding.check for row in rows] == ["versions", "output_dir", "hub"]
    assert lines[2].split() == ["output_dir", "ok", "0-2,5", "100", "to", "105", "MB/s"]
    assert max(map(len, lines)) <= 100 and TOKEN not in "".join(lines) and "[redacted]" in "".join(lines)
    plain = table.as_dict(rows)
    assert plain[1]["figures"] == {"rate": [100, 101, 102, 105]} and TOKEN not in json.dumps(plain)
    assert table.summary(rows) == "1 FAIL, 2 ok"


def test_versions_that_differ_are_named_with_their_hosts():
    usual = {"jax": "0.10.2", "flax": "0.12.8"}
    everyone = {0: usual, 1: usual | {"jax": "0.10.1"}, 2: usual, 3: {"flax": "0.12.8"}}
    found = versions.differences(everyone, "versions", "mend")
    assert [host for host, _ in found] == [1, 3] and {finding.state for _, finding in found} == {FAIL}
    assert found[0][1].found == "jax is 0.10.1 on host 1, but 0.10.2 on hosts 0,2"
    assert "jax is absent on host 3" in found[1][1].found
    assert versions.differences({0: usual, 1: usual}, "versions", "mend") == []


def test_versions_out_of_range(tmp_path, monkeypatch):
    assert versions.in_range(versions.here()).state == OK
    shadow(tmp_path, "numpy", "1.26.4")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions.in_range(versions.here())
    assert found.state == FAIL and "numpy 1.26.4 (" in found.found and "flax" not in found.found


def shadow(folder, name, version):
    """Metadata of a package as pip leaves them; found first where `folder` is on the path."""
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    return folder


@contextlib.contextmanager
def holder(body, *arguments):
    """A process that has run `body` and waits."""
    program = f"import fcntl, socket, sys, time; {body}; print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_who_holds_a_tpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    device, lock = tmp_path / "accel0", tmp_path / "libtpu_lockfile"
    device.touch()
    assert tpu.look([], str(lock)).state == SKIPPED
    assert tpu.look([str(device)], str(lock)).state == OK
    with holder("f = open(sys.argv[1])", device) as process:
        found = tpu.look([str(device)], str(lock))
        assert found.state == FAIL and f"pid {process.pid} ({sys.executable}" in found.found
    with holder("f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)", lock) as process:
        found = tpu.look([str(device)], str(lock))
        assert found.state == FAIL and f"{lock} is locked by pid {process.pid} (" in found.found
    found = tpu.look([str(device)], str(lock))
    assert found.state == OK and "nobody has locked it" in found.found
    with open(lock, "r+") as file:  # the question has taken no lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    assert "libtpu is not installed" in tpu.look([str(device)], str(lock)).found


def test_a_directory_is_measured_and_left_as_it_was(tmp_path):
    probes = storage.Probes()
    found = storage.look("output_dir", str(tmp_path / "a" / "run"), probes, size=2**20)
    assert (
        found.state == OK
        and "will be made" in found.found
        and all(found.figures[name][0] > 0 for name in found.figures)
    )
    assert list(tmp_path.iterdir()) == []
    found = storage.look("compilation_cache", str(tmp_path), probes, size=2**20)
    assert (found.check, found.state) == ("cache", OK) and "made" not in found.found


@pytest.mark.parametrize("directory", ["FILE/run", "/proc/easyrm/run"])
def test_a_directory_that_cannot_be_written(tmp_path, directory):
    (tmp_path / "file").touch()
    found = storage.look("output_dir", directory.replace("FILE", str(tmp_path / "file")), storage.Probes(), size=2**20)
    assert found.state == FAIL and "--output_dir" in found.way_out
    assert "is a file" in found.found or "/proc cannot be written (" in found.found


def test_what_a_hanging_check_has_written_is_removed(tmp_path):
    probes = storage.Probes()
    held = probes.file(epath.Path(tmp_path))
    held.__enter__().write_bytes(b"x")
    assert len(list(tmp_path.iterdir())) == 1
    probes.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InterruptedError), probes.file(epath.Path(tmp_path)):
        pass


def test_a_directory_that_another_host_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_SEEN_SECONDS", 0.1)
    assert following.sees(str(tmp_path)) and not following.sees(str(tmp_path / "x"))
    [(host, found)] = leading._shared(str(tmp_path / "x"), {1: True, 2: False})
    assert host == 2 and found.state == FAIL and str(tmp_path) in found.found and "gs://" in found.way_out


def test_space(tmp_path, monkeypatch):
    config = run_config({"output_dir": str(tmp_path / "run"), "data.train": str(write_lines(tmp_path / "x.jsonl", []))})
    config.export = True
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2e12}))
    tmp, output = space.disk(config, SIZES["debug"])
    assert (tmp.state, output.state) == (OK, OK)
    # 12 bytes a parameter, as docs/planning.md has it: 69.5 billion without the head.
    [_, output] = space.disk(config, SIZES["llama3.1-70b"])
    assert output.state == WARN and "a checkpoint takes about 83" in output.found
    monkeypatch.setattr(space, "available_memory", lambda: 100e9)
    assert space.memory(config, SIZES["llama3.1-70b"], 16, accelerator=True).state == OK
    assert space.memory(config, SIZES["llama3.1-70b"], 8, accelerator=True).state == FAIL
    assert space.memory(config, None, 1, accelerator=False).state == OK


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, one gated data set, and nothing else."""

    def do_GET(self):
        sizes = {"config.json": 9, "model.safetensors": 5 * 10**9, "consolidated.safetensors": 5 * 10**18}
        files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
        body, status, error = b"", 200, ""
        if self.path.startswith("/api/models/org/model"):
            body = json.dumps({"id": "org/model", "gated": False, "siblings": files}).encode()
        elif self.path.endswith("/auth-check"):
            status, error = 403, "GatedRepo"
        elif self.path.startswith("/api/datasets/org/gated"):
            body = json.dumps({"id": "org/gated", "gated": "manual", "siblings": []}).encode()
        else:
            status, error = 401, "RepoNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sources.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = {"model.init_from": "hf://org/model", "data.train": "hf://org/gated:train", "data.eval": "hf://org/none"}
    used = sources.repositories(run_config(settings))
    assert [one.check for one in used] == ["model", "tokenizer", "data.train", "data.eval"]
    assert sources.token(used).found.startswith("a token is set") and sources.token([]).state == SKIPPED
    server = HTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = huggingface_hub.HfApi(endpoint=f"http://localhost:{server.server_port}")
    model, tokenizer, gated, absent = (sources.hub(one, api) for one in used)
    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "access", lambda *_: False)
        readonly = sources.hub(used[0], api)
    server.shutdown()
    server.server_close()
    assert model.state == OK and "5.0 GB to download" in model.found
    assert readonly.state == FAIL and "may not write" in readonly.found and "HF_HOME" in readonly.way_out
    assert tokenizer.state == FAIL and "no tokenizer.json or tokenizer.model" in tokenizer.found
    assert gated.state == FAIL and "is gated" in gated.found and "HF_TOKEN" in gated.way_out
    assert absent.state == FAIL and "hf://org/none is not there" in absent.found
    away = sources.hub(used[0], api)
    assert away.state == FAIL and "does not answer" in away.found
    assert TOKEN not in repr([model, tokenizer, gated, absent, away, sources.token(used)])


def test_data_and_tokenizer(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", make_pairs(2))
    bad = write_lines(tmp_path / "bad.jsonl.gz", [{"chosen": "text"}])
    assert sources.data("data.train", str(good), ranked=False).state == OK
    found = sources.data("data.eval", f"{good},{bad}", ranked=False)
    assert found.state == FAIL and f"{bad}:1: malformed: chosen is a str" in found.found
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert "holds no record" in sources.data("data.train", str(empty), ranked=False).found
    with pytest.raises(InputError, match="no such file"):
        sources.data("data.train", str(tmp_path / "none.jsonl"), ranked=False)
    config = run_config({"tokenizer": str(make_tokenizer(tmp_path / "tokenizer.model")), "model.config": "debug"})
    assert "320 tokens, EOS </s>" in sources.load_tokenizer(config).found
    assert "2 layers, width 64" in sources.model(config).found


def test_a_trial_that_hangs_or_aborts():
    begins = 'import os, sys, time; print(\'{"begins": "matmul"}\', flush=True);'
    trial, began = Trial([sys.executable, "-c", f"{begins} time.sleep(60)"]), time.monotonic()
    trial.run({}, 4)
    assert time.monotonic() - began < 30
    assert [(finding.check, finding.state) for finding in trial.findings] == [
        ("matmul", FAIL),
        ("devices", SKIPPED),
        ("mesh", SKIPPED),
        ("all-reduce", SKIPPED),
    ]
    assert re.search(r"no answer within \d+ s", trial.findings[0].found)
    trial = Trial([sys.executable, "-c", f"{begins} print('F: heartbeat', file=sys.stderr, flush=True); os.abort()"])
    trial.run({}, 10)
    assert trial.findings[0].found == "its process ended with status -6: F: heartbeat"


def test_a_slow_device_is_named():
    rates = {0: {"0": 100.0, "1": 98.0}, 1: {"2": 101.0, "3": 40.0}}
    [(host, found)] = slow_devices(rates)
    assert (host, found.state) == (1, WARN) and "slow: device 3 40 TFLOP/s" in found.found
    assert slow_devices({}) == [] and slow_devices({0: {"0": 1.0}}) == []
