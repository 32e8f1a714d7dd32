"""The scoring server in a process of its own: real sockets, signals, and a real model."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import TINY_MODEL, call, command, make_pairs, make_tokenizer, make_world, run, write_lines
from stand_in import ANSWER, wait

from easyrm.data.template import render
from easyrm.data.tokenizer import load_tokenizer

pytest.importorskip("uvicorn", reason="the extra `serve` is absent")

_SERVER = """
import sys, time
tests, tokenizer, scoring, loading = sys.argv[1:]
sys.path.insert(0, tests)
from stand_in import Stand
from easyrm.data.tokenizer import load_tokenizer
from easyrm.serving.app import Limits
from easyrm.serving.server import run_server

class Slow(Stand):
    def score(self, conversations):
        time.sleep(float(scoring) if conversations[0].prompt else 0)  # the warm-up has none
        return super().score(conversations)

def open_scorer():
    time.sleep(float(loading))
    return Slow(load_tokenizer(tokenizer))

run_server(open_scorer, host="127.0.0.1", port=0, limits=Limits())
"""


class Server:
    """A server process that listens."""

    def __init__(self, arguments, **environment):
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        line = self.process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), line + self.process.stderr.read()
        self.port = int(line.split(";")[0].rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def ready(self):
        wait(lambda: self.request("GET", "/health")[0] == 200, 120)
        return self

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def ask(self, inputs):
        return self.request("POST", "/score", json.dumps({"inputs": inputs}))

    def counts(self):
        return self.request("GET", "/health")[1]["counts"]

    def stop(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def stand_in_server(tokenizer_file, *, scoring=0.0, loading=0.0):
    tests = str(Path(__file__).parent)
    return Server([sys.executable, "-c", _SERVER, tests, str(tokenizer_file), str(scoring), str(loading)])


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("serve") / "tokenizer.model")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_is_in_flight(tokenizer_file, number):
    with stand_in_server(tokenizer_file, scoring=0.5).ready() as server, ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(server.ask, [f"ant {i}"]) for i in range(50)]
        idle = socket.create_connection(("127.0.0.1", server.port))  # says nothing, and delays nothing
        wait(lambda: server.counts()["requests"] == 50)
        status, out, err = server.stop(number)
        assert [answer.result()[0] for answer in answers] == [200] * 50
        assert status == 0 and "stopped after 50 requests in " in out and "Traceback" not in err
        assert 2 <= int(out.rpartition("requests in ")[2].split()[0]) < 50
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            server.ask(["ant"])


def test_stops_at_once_while_the_model_is_loaded_and_at_a_second_signal(tokenizer_file):
    with stand_in_server(tokenizer_file, loading=60) as server:
        wait(lambda: server.request("GET", "/health")[0] == 503)
        assert server.stop(signal.SIGTERM)[0] == 0
    with stand_in_server(tokenizer_file, scoring=60).ready() as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.ask, ["ant"])
        wait(lambda: server.counts()["requests"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert "finishing what is in flight" in server.process.stderr.readline()
        assert server.stop(signal.SIGTERM)[0] == 128 + signal.SIGTERM
        assert answer.exception() is not None


def test_large_bodies_and_clients_that_leave(tokenizer_file):
    text = "ant " * 10
    with stand_in_server(tokenizer_file, scoring=3).ready() as server, ThreadPoolExecutor() as pool:
        inputs = [{"role": "user", "content": text}] * 130
        status, answer = server.ask([[*inputs, ANSWER]] * 700)  # 5 MB
        assert status == 422 and answer["error"].startswith("inputs[0]: ")
        status, answer = server.request("POST", "/score", b" " * (64 * 2**20 + 1))
        assert status == 413 and "above 64 MB" in answer["error"]

        running = pool.submit(server.ask, ["ant"])
        wait(lambda: server.counts()["batches"] == 1)
        leaving = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        body = json.dumps({"inputs": ["bee"] * 5}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        leaving[0].sendall(head + body)
        leaving[1].sendall(head + body[:9])
        leaving[2].sendall(b"POST /sco")
        wait(lambda: server.counts()["requests"] == 2)
        staying = pool.submit(server.ask, ["cat", "dog"])
        for connection in leaving:
            connection.close()
        assert running.result()[0] == staying.result()[0] == 200 and len(staying.result()[1]["rewards"]) == 2
        wait(lambda: server.counts()["abandoned"] == 5)
        status, _, err = server.stop(signal.SIGTERM)
        assert status == 0 and "Traceback" not in err


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    run({**make_world(folder), "total_steps": 2, "output_dir": str(folder / "run"), "export": True})
    return folder / "run"


def test_rewards_are_those_of_score(exported, tmp_path):
    conversations = [pair[side] for pair in make_pairs(20, seed=5) for side in ("chosen", "rejected")]
    write_lines(tmp_path / "in.jsonl", [{"messages": messages} for messages in conversations])
    settings = {"model": exported / "export", "dtype": "fp32", "mesh_dim": "1,1,1"}
    result = call("score", {**settings, "input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl"})
    assert result.returncode == 0, result.stderr
    expected = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    tokenizer = load_tokenizer(str(exported / "export"))
    with Server(command("serve", {**settings, "port": 0}), **one).ready() as server, ThreadPoolExecutor(20) as pool:
        status, answer = server.ask(conversations)
        assert status == 200 and answer["rewards"] == pytest.approx(expected, abs=1e-5)
        assert len({round(reward, 4) for reward in expected}) > 30
        texts = [render(messages, tokenizer.bos, tokenizer.eos) for messages in conversations]
        before = server.counts()
        answers = list(pool.map(lambda text: server.ask([text]), texts))
        assert [answer["rewards"][0] for _, answer in answers] == pytest.approx(expected, abs=1e-5)
        after = server.counts()
        assert after["requests"] - before["requests"] == 40 > after["batches"] - before["batches"]
        assert after["tokens_computed"] > before["tokens_computed"]
        health = server.request("GET", "/health")[1]
        assert health["max_length"] == TINY_MODEL["max_position_embeddings"]
        assert health["model"] == str(exported / "export") and health["normalized"] is False
        assert server.stop(signal.SIGTERM)[0] == 0


def test_what_cannot_be_served_is_one_line(exported, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        many = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
        absent = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
        for settings, environment, match in (
            ({"model": ""}, {}, "--model is empty"),
            ({"model": exported, "host": ""}, {}, "--host is empty"),
            ({"model": exported, "port": port}, {}, f"--port={port}: cannot listen (Address already in use); choose"),
            ({"model": exported, "host": "no.such.host.invalid"}, {}, "--host=no.such.host.invalid"),
            ({"model": tmp_path / "nothing", "port": 0}, {}, "no such model"),
            ({"model": exported, "port": 0, "max_queue": 3}, {}, "--max_inputs=1024 is above --max_queue=3"),
            ({"model": exported, "port": 0, "normalize": "true"}, {}, "--normalize"),
            ({"model": exported, "port": 0}, many, "serve runs on one host, and this is one of 2 processes"),
            ({"model": exported, "port": 0}, absent, "starlette is not installed; pip install easyrm[serve]"),
        ):
            result = call("serve", settings, **environment)
            assert result.returncode == 2 and match in result.stderr, result.stderr
            assert len(result.stderr.splitlines()) == 1
