"""The scoring server: every answer to every kind of request, batches, limits, failures and stops."""

import asyncio
import contextlib
import json
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import make_tokenizer
from stand_in import ANSWER, USER, Stand, wait

pytest.importorskip("starlette", reason="the extra `serve` is absent")
pytest.importorskip("uvicorn", reason="the extra `serve` is absent")
from starlette.testclient import TestClient

from easyrm.data.pairs import Dropped, messages_of
from easyrm.data.template import render
from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError
from easyrm.serving import app as app_module
from easyrm.serving.app import Limits, make_app
from easyrm.serving.batcher import Batcher
from easyrm.serving.requests import Refused, conversations_of, text_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(make_tokenizer(tmp_path_factory.mktemp("serve") / "tokenizer.model")))


@pytest.fixture
def stand(tokenizer):
    return Stand(tokenizer)


@contextlib.contextmanager
def client_of(open_scorer, **limits):
    limits = Limits(**limits)
    batcher = Batcher(open_scorer, max_batch=limits.max_batch, max_queue=limits.max_queue)
    ended = []
    app = make_app(batcher, limits, ended.append, lambda: ended.append(batcher.failure))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.batcher, client.ended = batcher, ended
        yield client


@contextlib.contextmanager
def ready_client(stand, **limits):
    with client_of(lambda: stand, **limits) as client:
        wait(lambda: client.ended)
        assert client.ended == [stand]
        stand.batches.clear()
        yield client


def ask(client, inputs):
    return client.post("/score", json={"inputs": inputs})


def tokens(tokenizer, text):
    return len(tokenizer.encode_batch([text])[0])


def test_rewards_in_order_of_messages_and_of_texts(stand, tokenizer):
    two = [USER, ANSWER, USER, {"role": "assistant", "content": " dog  eel\n"}]
    bos, eos = tokenizer.bos, tokenizer.eos
    with ready_client(stand) as client:
        answer = ask(client, [[USER, ANSWER], two, render(two, bos, eos), "gnu"])
        assert answer.status_code == 200
        short, long = (tokens(tokenizer, render(messages, bos, eos)) for messages in ([USER, ANSWER], two))
        assert answer.json() == {"rewards": [short, long, long, tokens(tokenizer, f"{bos}gnu{eos}")]}
        assert short != long
        health = client.get("/health").json()
    counts = {"requests": 1, "conversations": 4, "batches": 1, "failed_batches": 0, "abandoned": 0, "waiting": 0}
    assert health["counts"].items() >= counts.items() and health["counts"]["tokens_computed"] > long
    del health["counts"]
    assert health == {"status": "ok", "model": "stand-in", "max_length": 90, "normalized": False}


def test_a_text_is_scored_as_it_stands_between_bos_and_eos(tokenizer):
    bos, eos = tokenizer.bos, tokenizer.eos
    whole = render([USER, ANSWER], bos, eos)
    bare = whole.removeprefix(bos).removesuffix(eos)
    for text in (whole, bare, bos + bare, bare + eos, whole + "\n", f"{whole} \n "):
        assert text_of(text, "", tokenizer) == whole, text
    assert text_of(bare + " \n", "", tokenizer) == bos + bare + " \n" + eos
    empty_answer = "<|user|>\nant\n<|assistant|>\n"
    assert text_of(empty_answer, "", tokenizer) == bos + empty_answer + eos
    for text in (tokenizer.pad * 3 + whole, whole + tokenizer.pad, bos + tokenizer.pad + bare):
        with pytest.raises(Refused, match=r"inputs\[0\]: begins or ends with the pad token"):
            text_of(text, "inputs[0]", tokenizer)


def test_one_prompt_however_it_is_written(tokenizer):
    other = {"role": "assistant", "content": "dog"}
    whole = render([USER, ANSWER], tokenizer.bos, tokenizer.eos)
    inputs = [[USER, ANSWER], [USER, other], whole, [ANSWER], "no marks", "none either"]
    body = json.dumps({"inputs": inputs}).encode()
    keys = [c.prompt for c in conversations_of(body, tokenizer, max_length=90, max_inputs=9)]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 4


BAD = {
    "the body is not JSON": (400, '{"inputs": ['),
    "the body is not JSON (maximum recursion": (400, "[" * 100000),
    "the body is an empty list; send an object": (400, "[]"),
    "the body is not JSON ('utf-8' codec": (400, b'{"inputs": ["\xff"]}'),
    "inputs: missing": (422, {}),
    "'input': unknown key": (422, {"input": ["a"], "inputs": ["a"]}),
    "inputs: an empty list; give a list": (422, {"inputs": []}),
    "inputs: a string; give a list": (422, {"inputs": "text"}),
    "inputs: 6 conversations; send at most 5 (--max_inputs)": (422, {"inputs": ["a"] * 6}),
    "inputs[1]: null; give a list of messages": (422, {"inputs": ["a", None]}),
    "inputs[0]: an object; give": (422, {"inputs": [{"messages": [ANSWER]}]}),
    "inputs[0]: a number; give": (422, {"inputs": [1.5]}),
    "inputs[0]: no messages": (422, {"inputs": [[]]}),
    "inputs[0]: no text": (422, {"inputs": [" \n"]}),
    "inputs[0]: no Unicode text": (422, '{"inputs": ["\\ud800"]}'),
    "inputs[0][0]: a string; a message is": (422, {"inputs": [["a"]]}),
    "inputs[3][0].role: 'tool'; the roles are system, user, assistant": (
        422,
        {"inputs": ["a", "b", "c", [{"role": "tool", "content": "x"}, ANSWER]]},
    ),
    "inputs[0][0].role: missing": (422, {"inputs": [[{"content": "x"}]]}),
    "inputs[0][0].role: ['user']": (422, {"inputs": [[{"role": ["user"], "content": "x"}, ANSWER]]}),
    "inputs[0][1].content: missing": (422, {"inputs": [[USER, {"role": "assistant"}]]}),
    "inputs[0][1].content: a list; give a string": (
        422,
        {"inputs": [[USER, {"role": "assistant", "content": ["cat"]}]]},
    ),
    "inputs[0][1].content: no text": (422, {"inputs": [[USER, {"role": "assistant", "content": "\n"}]]}),
    "inputs[0][0].role: user; the last message": (422, {"inputs": [[USER]]}),
    "inputs[1]: 93 tokens, more than max_length=90; shorten it": (422, {"inputs": ["a", "\u2603" * 30]}),
    "tokens, more than max_length=90": (422, {"inputs": ["ant " * 200000]}),
}


@pytest.fixture(scope="module")
def client(tokenizer):
    with ready_client(Stand(tokenizer), max_inputs=5, max_body_mb=1) as client:
        yield client
        assert ask(client, ["a"]).status_code == 200, "the server does not go on"


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said_in_one_line(client, message):
    status, body = BAD[message]
    answer = client.post("/score", content=json.dumps(body) if isinstance(body, dict) else body)
    assert answer.status_code == status and list(answer.json()) == ["error"], answer.text
    error = answer.json()["error"]
    assert message in error and "\n" not in error and len(error) < 200, error


def test_paths_methods_and_sizes(client):
    for method, path, status, match in (
        ("GET", "/score", 405, "GET /score: Method Not Allowed; there are POST /score and GET /health"),
        ("POST", "/health", 405, "POST /health"),
        ("GET", "/v1/models", 404, "GET /v1/models: no such path; there are"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status and match in answer.json()["error"]
    assert client.get("/score").headers["allow"] == "POST"
    for body in (b" " * (2**20 + 1), iter([b" " * 2**19] * 3)):  # with and without a Content-Length
        answer = client.post("/score", content=body)
        assert answer.status_code == 413 and "above 1 MB (--max_body_mb)" in answer.json()["error"]


def test_the_same_messages_are_refused_as_in_files(tokenizer):
    """Whatever the readers of files take for a conversation, the server does too, and nothing else."""
    pieces = [None, 3, "", " ", "cat", "\ud800", "user", "system", "assistant", "tool"]
    messages = [{"role": role, "content": content} for role in pieces for content in pieces[:6]] + [{}, [], None]
    agreed = Counter()
    for conversation in [
        [],
        *([m] for m in messages),
        *([USER, m] for m in messages),
        *([m, ANSWER] for m in messages),
    ]:
        try:
            messages_of({"messages": conversation}, "messages", "here")
            taken = True
        except (Dropped, InputError):
            taken = False
        try:
            text_of(conversation, "inputs[0]", tokenizer)
            assert taken, conversation
        except Refused:
            assert not taken, conversation
        agreed[taken] += 1
    assert min(agreed[True], agreed[False]) > 4


def in_background(pool, client, inputs):
    before = client.batcher.counts["requests"]
    answer = pool.submit(ask, client, inputs)
    wait(lambda: client.batcher.counts["requests"] > before)
    return answer


def test_what_arrives_while_the_devices_compute_is_scored_together(stand):
    with ready_client(stand, max_batch=4) as client, ThreadPoolExecutor() as pool:
        stand.gate.clear()
        first = in_background(pool, client, ["ant"])
        wait(lambda: stand.batches == [1])
        others = [in_background(pool, client, inputs) for inputs in (["a", "b"], ["c"] * 7, ["d"])]
        assert client.get("/health").json()["counts"]["waiting"] == 10
        stand.gate.set()
        assert [len(answer.result().json()["rewards"]) for answer in (first, *others)] == [1, 2, 7, 1]
        assert stand.batches == [1, 4, 4, 2]


def test_a_full_queue_is_said_and_ends(stand):
    with ready_client(stand, max_queue=3, max_inputs=3) as client, ThreadPoolExecutor() as pool:
        stand.gate.clear()
        running = in_background(pool, client, ["ant"])
        wait(lambda: stand.batches == [1])
        waiting = in_background(pool, client, ["a", "b"])
        refused = ask(client, ["c", "d"])
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "2 conversations wait, and 3 may (--max_queue)" in refused.json()["error"]
        fits = in_background(pool, client, ["c"])
        stand.gate.set()
        assert [x.result().status_code for x in (running, waiting, fits)] == [200] * 3
    with pytest.raises(InputError, match="--max_inputs=4 is above --max_queue=3"):
        Limits(max_queue=3, max_inputs=4)


def test_a_failure_is_of_one_batch_alone(stand, capsys):
    def fail(conversation):
        if len(conversation.tokens) > 30:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")
        return 1.0

    with ready_client(stand, max_batch=2) as client, ThreadPoolExecutor() as pool:
        stand.answer = fail
        stand.gate.clear()
        first = in_background(pool, client, ["ant"])
        wait(lambda: stand.batches == [1])
        # The batches are [big, small of a long request], [ ... the rest of it, which is not computed], [last].
        others = [in_background(pool, client, inputs) for inputs in (["\u2603" * 15], ["b"] * 4, ["c", "d"])]
        stand.gate.set()
        answers = [answer.result() for answer in (first, *others)]
        assert [answer.status_code for answer in answers] == [200, 500, 500, 200]
        assert stand.batches == [1, 2, 2] and client.batcher.counts["failed_batches"] == 1
        error = answers[1].json()["error"]
        assert "failed on a batch of 2 conversations (RuntimeError: RESOURCE_EXHAUSTED: out of); send" in error
        assert "Traceback" in capsys.readouterr().err


def test_too_few_rewards_are_a_failure(stand):
    with ready_client(stand) as client:
        stand.score = lambda conversations: [1.0]
        assert "1 rewards for 2 conversations" in ask(client, ["a", "b"]).json()["error"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused_to_its_request_alone(stand, value):
    stand.answer = lambda c: value if len(c.tokens) > 30 and len(c.tokens) < 60 else 1.0
    with ready_client(stand) as client, ThreadPoolExecutor() as pool:
        stand.gate.clear()
        first = in_background(pool, client, ["ant"])
        wait(lambda: stand.batches == [1])
        bad = in_background(pool, client, ["a", "\u2603" * 15])
        good = in_background(pool, client, ["a"])
        stand.gate.set()
        assert [x.result().status_code for x in (first, bad, good)] == [200, 500, 200]
        assert f"inputs[1]: its reward is {value} (1 of 2" in bad.result().json()["error"]


def test_503_until_the_model_is_loaded_and_warmed_up(stand):
    stand.gate.clear()
    opened = threading.Event()

    def open_scorer():
        opened.wait(60)
        return stand

    with client_of(open_scorer) as client:
        for loaded in (False, True):
            if loaded:
                opened.set()
                wait(lambda: stand.batches)  # it warms up
            for answer in (client.get("/health"), ask(client, ["a"])):
                assert answer.status_code == 503 and "is being loaded" in answer.json()["error"]
                assert int(answer.headers["retry-after"]) > 0
        stand.gate.set()
        wait(lambda: client.ended == [stand])
        assert ask(client, ["a"]).status_code == 200


@pytest.mark.parametrize("reason", ["absent", "nan"])
def test_a_model_that_cannot_serve_is_known_at_the_start(stand, reason):
    stand.answer = lambda c: math.nan

    def open_scorer():
        if reason == "absent":
            raise InputError("--model=x: no such model")
        return stand

    with client_of(open_scorer) as client:
        wait(lambda: client.ended)
        assert ("no such model" if reason == "absent" else "times EOS is nan") in str(client.ended[0])
        assert client.get("/health").status_code == 503


def test_a_body_that_does_not_arrive_is_not_waited_for(stand, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)

    async def slow():
        yield b"{"
        await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(60)

    sent = []

    async def send(message):
        sent.append(message)

    with ready_client(stand) as client:
        scope = {"type": "http", "method": "POST", "path": "/score", "headers": [], "query_string": b""}
        asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 408 and b"did not arrive within 0.05 s" in sent[1]["body"]
