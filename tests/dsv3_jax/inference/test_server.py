"""The server as the API's own client sees it: an engine with a tiny model, on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import sys
import threading
import time
from importlib import reload
from types import SimpleNamespace
from urllib.parse import urlsplit

import jax
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.request import Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.inference.server import app as app_module
from dsv3_jax.inference.server.app import Limits, make_app
from dsv3_jax.inference.server.request import ServedModel
from dsv3_jax.inference.server.run import HttpServer
from dsv3_jax.interop.chat_template import ChatTemplate
from dsv3_jax.interop.tokenizer import byte_tokenizer
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS

# Large weights: what comes is not the same token for ever.
MODEL = dataclasses.replace(MODELS["tiny"], vocab_size=264, num_hidden_layers=2, initializer_range=0.2)
SIZES = Sizes(rows=3, pages=36, page_size=8, context=96, waiting=6)
NAME = "tests/tiny"
TOKENIZER = byte_tokenizer()
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
TALK = [{"role": "system", "content": "count"}, {"role": "user", "content": "1 2 3"}]


@contextlib.contextmanager
def listening(app):
    server = HttpServer(app, "127.0.0.1", 0, grace_s=1, when_ready=lambda url: ready.set())
    ready, thread = threading.Event(), threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)


def client_of(url, key="none"):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def engine():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32")
    with Engine(on_mesh, on_mesh.prepare(*split_model(MODEL, 0)[1:]), SIZES, chunks=(16, 32)) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ServedModel(NAME, TOKENIZER, ChatTemplate(folder, TOKENIZER), engine.room, choices=12)


@pytest.fixture(scope="module")
def served(engine, model):
    """Address, client and log of a server."""
    log = []
    with listening(make_app(engine, model, log=log.append)) as server:
        yield SimpleNamespace(url=server.url, client=client_of(server.url), log=log)


@pytest.fixture
def ask(served):
    """A completion of "1 2 3", greedy unless told otherwise."""
    def ask(**options):
        return served.client.completions.create(**{"model": NAME, "prompt": "1 2 3", "temperature": 0,
                                                   "max_tokens": 20} | options)
    return ask


@pytest.fixture
def chat(served):
    def chat(**options):
        return served.client.chat.completions.create(**{"model": NAME, "messages": TALK, "temperature": 0,
                                                        "max_tokens": 20} | options)
    return chat


@pytest.fixture
def brake(engine, monkeypatch):
    """Steps wait until it is set; prompts are read all the same."""
    free, step = threading.Event(), engine._programs.step

    def braked(*arguments):
        assert free.wait(30)
        return step(*arguments)
    monkeypatch.setattr(engine._programs, "step", braked)
    yield free
    free.set()
    eventually(lambda: engine.running == engine.waiting == 0)


def eventually(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ids_of(text):
    return np.array([TOKENIZER.bos, *TOKENIZER.encode(text)], np.int32)


def engines_own(engine, prompt, count=20, **sampling):
    """The tokens that the engine gives without a server."""
    sampling = Sampling(**{"temperature": 0} | sampling)
    return engine.submit(Request(prompt, count, sampling, frozenset([TOKENIZER.eos]))).wait(60)


def text_of(tokens):
    return TOKENIZER.decode([token for token in tokens if token != TOKENIZER.eos])


def metric(url, name, **labels):
    """The sum of a metric's samples that have these labels."""
    status, _, body = raw(url, "GET", "/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]
    return sum(sample.value for sample in samples
               if sample.name == name and labels.items() <= sample.labels.items())


def raw(url, method, path, body=None, headers=None):
    """Status, headers and body of a request that the client library would not send."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


def post(url, path, body, **headers):
    status, headers, answer = raw(url, "POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
    return status, json.loads(answer)


# What is asked for, and answered.


@pytest.mark.parametrize("sampling", [
    {"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 7},
    {"seed": 2 ** 40 - 3, "extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}}], ids=str)
def test_a_completion_is_the_engines_answer_whole_and_streamed(engine, ask, sampling):
    ours = {"temperature": 1} | sampling | sampling.get("extra_body", {})
    ours.pop("extra_body", None)
    if "seed" in ours:
        ours["seed"] %= 2 ** 32
    tokens = engines_own(engine, ids_of("1 2 3"), **ours)
    whole = ask(**{"temperature": 1} | sampling)
    assert whole.choices[0].text == text_of(tokens)
    assert whole.choices[0].finish_reason == ("length" if tokens[-1] != TOKENIZER.eos else "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
        6, len(tokens), 6 + len(tokens))
    assert (whole.object, whole.model) == ("text_completion", NAME)
    parts = list(ask(**{"temperature": 1} | sampling, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for part in parts for choice in part.choices) == text_of(tokens)
    assert [choice.finish_reason for part in parts for choice in part.choices][-1] == whole.choices[0].finish_reason
    assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].usage.completion_tokens == len(tokens)
    assert {part.id for part in parts} == {parts[0].id} != {whole.id}


def test_a_conversation_goes_through_the_template(engine, chat):
    prompt = ids_of("s:count;u:1 2 3;a:")
    tokens = engines_own(engine, prompt)
    whole = chat()
    assert whole.choices[0].message.content == text_of(tokens)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    parts = list(chat(stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text_of(tokens)
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    in_parts = [{"role": "developer", "content": [{"type": "text", "text": "co"}, {"type": "text", "text": "unt"}]},
                TALK[1]]
    assert chat(messages=in_parts).choices[0].message.content == text_of(tokens)
    answer = whole.choices[0].message.model_dump()  # as clients send it back
    assert chat(messages=[*TALK, answer, TALK[1]], max_tokens=1).choices


def test_an_answer_takes_the_room_there_is_or_the_apis_default(engine, ask, chat):
    free = engine.room - len(ids_of("s:count;u:1 2 3;a:"))
    assert chat(max_tokens=openai.NOT_GIVEN, seed=1).usage.completion_tokens == free
    assert chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=3).usage.completion_tokens == 3
    assert ask(max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16


def test_every_form_of_prompt_and_several_choices(engine, ask):
    """Each choice is what its prompt and seed give alone."""
    texts = ["1 2 3", "we", "1 2 3"]
    answers = [text_of(engines_own(engine, ids_of(text), 6, temperature=0.8, seed=9 + choice))
               for text in texts for choice in range(2)]
    options = {"n": 2, "temperature": 0.8, "seed": 9, "max_tokens": 6}
    for prompt in (texts, [ids_of(text).tolist() for text in texts]):
        whole = ask(prompt=prompt, **options)
        assert [choice.text for choice in whole.choices] == answers
        assert [choice.index for choice in whole.choices] == list(range(6))
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6 + 3 + 6, 36)
        streamed = [""] * 6
        for part in ask(prompt=prompt, stream=True, **options):
            for choice in part.choices:
                streamed[choice.index] += choice.text
        assert streamed == answers
    one = ask(prompt=ids_of("we").tolist(), **options | {"n": 1})
    assert [choice.text for choice in one.choices] == answers[2:3]
    # Without a seed everyone draws another one.
    drawn = {choice.text for choice in ask(prompt=["we", "we"], n=2, temperature=1, max_tokens=12).choices}
    assert len(drawn) == 4


def test_echo_shows_the_prompt_before_the_answer(engine, ask):
    answer = text_of(engines_own(engine, ids_of("we"), 5))
    assert ask(prompt="we", echo=True, max_tokens=5).choices[0].text == "we" + answer
    parts = ask(prompt=[[ord("w"), ord("e")]], echo=True, max_tokens=5, stream=True)
    assert "".join(choice.text for part in parts for choice in part.choices).startswith("we")


def test_nothing_of_a_stop_sequence_shows(engine, ask):
    """It is spread over tokens: here each is a byte."""
    tokens = engines_own(engine, ids_of("1 2 3"), 60)
    text = text_of(tokens)
    at = next(at for at in range(3, len(text)) if text[at:at + 2].isascii() and text.find(text[at:at + 2]) == at)
    stop = text[at:at + 2]
    whole = ask(max_tokens=60, stop=["never comes", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[:at], "stop")
    assert text_of(tokens[:whole.usage.completion_tokens]) == text[:at + 2], "tokens up to the stop sequence count"
    parts = list(ask(max_tokens=60, stop=stop, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for part in parts for choice in part.choices) == text[:at]
    assert parts[-1].usage == whole.usage.model_copy(update={
        "prompt_tokens_details": parts[-1].usage.prompt_tokens_details})
    eventually(lambda: engine.running == 0)


def test_an_answer_that_has_stopped_leaves_its_row_to_others(engine, ask, monkeypatch):
    """It does not wait for the other answers of its request."""
    step = engine._programs.step
    first, second = (text_of(engines_own(engine, ids_of(text), 60)) for text in ("1 2 3", "6"))
    stop = next(character for character in first[:10] if character.isascii() and character not in second)
    monkeypatch.setattr(engine._programs, "step", lambda *arguments: (time.sleep(0.005), step(*arguments))[1])
    new = engine.totals.new_tokens
    both = ask(prompt=["1 2 3", "6"], max_tokens=60, stop=stop)
    assert [choice.finish_reason for choice in both.choices] == ["stop", "length"]
    assert engine.totals.new_tokens - new < 90, "of 120"


def test_a_prompt_seen_before_is_told_as_cached(ask):
    prompt = "a beginning that nobody else here uses"
    assert ask(prompt=prompt).usage.prompt_tokens_details.cached_tokens == 0
    assert ask(prompt=prompt + "!").usage.prompt_tokens_details.cached_tokens == 32  # four pages of 8


def test_models(served):
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match=NAME):
        served.client.models.retrieve("gpt")


# What is refused, and how that is told.


@pytest.mark.parametrize(("endpoint", "body", "status", "param", "says"), [
    ("completions", {"model": "gpt"}, 404, "model", "not served here: ask for tests/tiny"),
    ("completions", {"model": None}, 400, "model", "is missing"),
    ("completions", {"prompt": None}, 400, "prompt", "is missing"),
    ("completions", {"prompt": []}, 400, "prompt", "not empty"),
    ("completions", {"prompt": ["a", 3]}, 400, "prompt", "array of strings"),
    ("completions", {"prompt": [True]}, 400, "prompt", "token ids"),
    ("completions", {"prompt": [2 ** 40]}, 400, "prompt", "token ids"),
    ("completions", {"prompt": [264]}, 400, "prompt", r"token 264 outside model.vocab_size \(264\)"),
    ("completions", {"prompt": "x" * 96}, 400, "prompt", "context is 96 tokens, but 98 were asked for: 97 in prompt"),
    ("completions", {"max_tokens": 95}, 400, "prompt", "context is 96 tokens"),
    ("completions", {"max_tokens": 0}, 400, "max_tokens", r"\(0\) must be at least 1"),
    ("completions", {"max_tokens": 2.5}, 400, "max_tokens", "must be an integer"),
    ("completions", {"n": True}, 400, "n", "must be an integer"),
    ("completions", {"n": 13}, 400, "n", "more than the 12 answers"),
    ("completions", {"temperature": "hot"}, 400, "temperature", "must be a number"),
    ("completions", {"temperature": -1}, 400, "temperature", r"\(-1.0\) must be at least 0"),
    ("completions", {"temperature": 10 ** 400}, 400, "temperature", "must be a number"),
    ("completions", {"top_p": 0}, 400, "top_p", r"must be in \(0, 1\]"),
    ("completions", {"top_k": 2 ** 31}, 400, "top_k", "must be in"),
    ("completions", {"stop": [""]}, 400, "stop", "of 1 to 256 characters"),
    ("completions", {"stop": list("abcde")}, 400, "stop", "at most 4"),
    ("completions", {"stop": 3}, 400, "stop", "must be a string or an array"),
    ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true only"),
    ("completions", {"stream": True, "stream_options": {"usage": 1}}, 400, "stream_options.usage", "is no parameter"),
    ("completions", {"logprobs": 2}, 400, "logprobs", "is not supported; leave it out"),
    ("completions", {"logit_bias": {"3": 1}}, 400, "logit_bias", "is not supported; leave it out or give {}"),
    ("completions", {"best_of": 3}, 400, "best_of", "leave it out or give 1"),
    ("completions", {"temprature": 1}, 400, "temprature", "is no parameter of this endpoint"),
    ("chat/completions", {"presence_penalty": 1}, 400, "presence_penalty", "leave it out or give 0"),
    ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", "is not supported"),
    ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format", "is not supported"),
    ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "give one"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least one"),
    ("chat/completions", {"messages": ["hi"]}, 400, "messages[0]", "must be an object"),
    ("chat/completions", {"messages": [{"role": "tool", "content": ""}]}, 400, "messages[0].role", "must be one of"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content", "is missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages[0].content[0].type", r"\(image_url\) is not supported"),
    ("chat/completions", {"messages": [{"role": "user", "content": "<|end_of_text|>"}]}, 400, "messages",
     "spells the special token"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x" * 96}]}, 400, "messages",
     "context is 96 tokens"),
], ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(served, endpoint, body, status, param, says):
    good = {"prompt": "a"} if endpoint == "completions" else {"messages": TALK}
    got, answer = post(served.url, f"/v1/{endpoint}", {"model": NAME} | good | body)
    with pytest.raises(ValueError, match=says):
        raise ValueError(answer["error"]["message"])
    assert (got, answer["error"]["param"]) == (status, param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert ("context is" in says) == (answer["error"]["code"] == "context_length_exceeded")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000,
                                  b'{"model": "\\ud800"}', b"9" * 5000,
                                  '{"model": "\\ud800"}'.encode("utf-16")], ids=lambda body: str(body)[:20])
def test_what_is_no_json_object_is_refused(served, body):
    status, answer = post(served.url, "/v1/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_fields_that_change_nothing_are_let_through(ask, chat):
    plain = ask(max_tokens=4).choices[0].text
    assert ask(max_tokens=4, presence_penalty=0, logit_bias={}, best_of=1, user="me").choices[0].text == plain
    assert chat(max_tokens=2, logprobs=False, tool_choice="none", response_format={"type": "text"}, store=False,
                metadata={"a": "b"}, parallel_tool_calls=True).choices


def test_unknown_addresses_and_methods_are_refused_in_the_apis_form(served):
    for method, path, status in [("GET", "/v1/embeddings", 404), ("GET", "/v1/completions", 405)]:
        got, _, body = raw(served.url, method, path)
        assert (got, json.loads(body)["error"]["type"]) == (status, "invalid_request_error")


def test_keys_are_asked_for(engine, model):
    with listening(make_app(engine, model, keys=["first", "zweiter schlüssel"])) as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"},
                      {"Authorization": "Bearer"}):
            status, _, body = raw(server.url, "POST", "/v1/completions", b"{}", given)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert raw(server.url, "GET", "/v1/models", headers=given)[0] == 401
        client = client_of(server.url, "first")
        assert client.completions.create(model=NAME, prompt="a", max_tokens=1).choices
        assert raw(server.url, "GET", "/health")[0] == 200
        second = {"Authorization": "Bearer zweiter schlüssel".encode()}
        assert raw(server.url, "GET", "/v1/models", headers=second)[0] == 200
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.with_options(api_key="firs").models.list()


def test_bodies_that_are_too_long_or_too_slow_are_refused(engine, model):
    limits = Limits(body_bytes=1000, read_s=0.3)
    with listening(make_app(engine, model, limits=limits)) as server:
        long = json.dumps({"model": NAME, "prompt": "a" * 2000}).encode()
        for body in (long, iter([long[:500], long[500:]])):  # with its length, and in chunks
            status, _, answer = raw(server.url, "POST", "/v1/completions", body)
            assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(20)
            answer = slow.makefile("rb").read()  # to the end: the server closes
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_model_without_a_template_does_not_chat(engine, model):
    with listening(make_app(engine, dataclasses.replace(model, template=None))) as server:
        status, answer = post(server.url, "/v1/chat/completions", {"model": NAME, "messages": TALK})
    assert status == 400
    assert "has no chat template: ask /v1/completions" in answer["error"]["message"]


# Many at once, and clients that do not behave.


def test_a_full_line_is_told_and_leaves_nothing_behind(engine, served, ask, brake):
    """One runs, six wait; the next finds no place, and those that came with it go."""
    new = engine.totals.new_tokens
    streams = [ask(prompt=f"{number} of many", stream=True, stream_options={"include_usage": True})
               for number in range(3)]
    eventually(lambda: (engine.running, engine.waiting) == (1, 2))
    with pytest.raises(openai.RateLimitError, match="the server is busy") as refused:
        ask(n=5)
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.body["type"] == "rate_limit_error"
    brake.set()
    served_tokens = sum(list(stream)[-1].usage.completion_tokens for stream in streams)
    eventually(lambda: engine.free_pages == SIZES.pages)
    assert engine.totals.new_tokens - new == served_tokens > 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_requests(engine, served, brake, stream):
    """The one that runs and those that wait."""
    before, new = len(served.log), engine.totals.new_tokens
    body = json.dumps({"model": NAME, "prompt": ["gone away"] * 5, "max_tokens": 80, "stream": stream}).encode()
    with socket.create_connection((urlsplit(served.url).hostname, urlsplit(served.url).port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        eventually(lambda: engine.running and engine.running + engine.waiting == 5)
        if stream:
            assert b"event-stream" in client.recv(10_000)
    eventually(lambda: len(served.log) > before)
    assert " 499 " in served.log[-1]
    brake.set()
    eventually(lambda: engine.running == engine.waiting == 0)
    assert engine.free_pages == SIZES.pages
    assert engine.totals.new_tokens - new < 20, "of 400"


def test_a_client_that_goes_away_within_its_body_is_forgotten(served):
    before = metric(served.url, "dsv3_requests_total", outcome="disconnected")
    with socket.create_connection((urlsplit(served.url).hostname, urlsplit(served.url).port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    eventually(lambda: metric(served.url, "dsv3_requests_total", outcome="disconnected") == before + 1)


def test_a_client_that_does_not_read_keeps_nobody_waiting(engine, model, served, ask):
    """Its answer is made to the end though it takes none of it, another client is served meanwhile, and after
    `write_s` it is given up."""
    log, stuck = [], []
    app = make_app(engine, model, limits=Limits(write_s=2.0), log=log.append)
    body = json.dumps({"model": NAME, "prompt": "slow", "max_tokens": 80, "stream": True, "temperature": 0}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
             "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http", "server": ("x", 1), "root_path": ""}

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        stuck.append(message)
        if len(stuck) > 2:
            await asyncio.Event().wait()
    length = len(engines_own(engine, ids_of("slow"), 80))
    assert length > 10
    new = engine.totals.new_tokens
    thread = threading.Thread(target=lambda: asyncio.run(app(scope, receive, send)), daemon=True)
    thread.start()
    eventually(lambda: len(stuck) == 3)
    assert ask(max_tokens=5).usage.completion_tokens == 5
    eventually(lambda: engine.totals.new_tokens - new == length + 5 and engine.free_pages == SIZES.pages)
    assert thread.is_alive()
    thread.join(20)
    assert len(stuck) == 3
    assert " 499 " in log[-1]


def test_users_have_turns(engine, served, brake):
    """The second user's one request does not wait for all of the first's."""
    order, threads = [], []

    def run(user, number):
        body = {"model": NAME, "prompt": f"turn {user} {number}", "max_tokens": 10, "user": user, "temperature": 0}
        assert post(served.url, "/v1/completions", body)[0] == 200
        order.append(user)
    for number, user in enumerate("aaaaab"):
        threads.append(threading.Thread(target=run, args=(user, number), daemon=True))
        threads[-1].start()
        eventually(lambda waiting=number: (engine.running, engine.waiting) == (1, waiting))
    brake.set()
    for thread in threads:
        thread.join(20)
    assert order.index("b") < 3, "the first, and of the others one of each"


def test_metrics_add_up(served, ask, brake):
    brake.set()
    names = ["dsv3_prompt_tokens_total", "dsv3_completion_tokens_total", "dsv3_reused_prompt_tokens_total",
             "dsv3_time_to_first_token_seconds_count", "dsv3_time_per_output_token_seconds_count",
             "dsv3_end_to_end_seconds_count", "dsv3_engine_new_tokens_total"]
    before = {name: metric(served.url, name) for name in names}
    counted = {finish: metric(served.url, "dsv3_choices_total", finish=finish) for finish in ("stop", "length")}
    invalid = metric(served.url, "dsv3_requests_total", outcome="invalid")
    ok = metric(served.url, "dsv3_requests_total", endpoint="/v1/completions", outcome="ok")
    usages = [ask(prompt=["metrics that add up", "and up"], n=2, max_tokens=7).usage for _ in range(2)]
    with pytest.raises(openai.BadRequestError):
        ask(max_tokens=0)
    now = {name: metric(served.url, name) - before[name] for name in names}
    new = sum(usage.completion_tokens for usage in usages)
    reused = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert reused >= 16
    assert now == dict(zip(names, [sum(usage.prompt_tokens for usage in usages), new, reused, 8, 8, 8, new],
                           strict=True))
    assert sum(metric(served.url, "dsv3_choices_total", finish=finish) - counted[finish] for finish in counted) == 8
    assert metric(served.url, "dsv3_requests_total", outcome="invalid") == invalid + 1
    assert metric(served.url, "dsv3_requests_total", endpoint="/v1/completions", outcome="ok") == ok + 2
    assert metric(served.url, "dsv3_engine_free_pages") == SIZES.pages
    assert metric(served.url, "dsv3_engine_up") == 1
    line = served.log[-2]
    assert f"completion_tokens {usages[-1].completion_tokens} finish " in line
    assert f"cached_tokens {usages[-1].prompt_tokens_details.cached_tokens} " in line


def test_an_engine_that_failed_is_told_to_everybody(engine, served, ask, monkeypatch):
    def fail(*_):
        raise FloatingPointError("broken")
    assert raw(served.url, "GET", "/health")[::2] == (200, b'{"status":"ok"}')
    with monkeypatch.context() as patch:
        patch.setattr(engine._programs, "step", fail)
        with pytest.raises(openai.APIError, match="the engine has failed: broken"):
            list(ask(stream=True))
    try:
        with pytest.raises(openai.InternalServerError, match="the engine has failed: broken"):
            ask()
        assert ["FloatingPointError: broken" in line and "Traceback" in line for line in served.log].count(True) == 1
        status, _, body = raw(served.url, "GET", "/health")
        assert (status, json.loads(body)) == (503, {"status": "failed", "error": "broken"})
        assert metric(served.url, "dsv3_engine_up") == 0
    finally:  # mended for the other tests
        engine.stop()
        engine.error = None
        engine.start()


def test_a_server_that_stops_lets_requests_end_and_cancels_the_rest(engine, model, brake):
    log = []
    with listening(make_app(engine, model, log=log.append)) as server:
        client = client_of(server.url)
        stream = client.completions.create(model=NAME, prompt="to the end", max_tokens=60, stream=True)
        eventually(lambda: engine.running == 1)
    with pytest.raises(openai.APIError, match="the server is being stopped"):
        list(stream)  # no step was taken, so it could not end
    assert " 503 " in log[-1]
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_port_that_is_taken_is_named(engine, model, served):
    with pytest.raises(ConfigError, match=rf"port \({urlsplit(served.url).port}\)"):
        HttpServer(make_app(engine, model), "127.0.0.1", urlsplit(served.url).port)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.routing", None)
    with pytest.raises(ImportError, match=r'pip install "dsv3-jax\[serve\]"'):
        reload(app_module)
