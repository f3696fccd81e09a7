"""The engine's answers are those that each request would get alone, whatever else goes on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.forward import decode
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.pace import Targets
from dsv3_jax.inference.request import Finish, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Busy, Sizes
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS

# Large weights, so that float32's rounding decides no choice of a token.
MODEL = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2, initializer_range=0.2)
GREEDY = Sampling(temperature=0)
SMALL = Sizes(rows=3, pages=14, page_size=4, context=48)
"""Three requests of 48 tokens want 36 pages: somebody gives way."""


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@functools.cache
def weights():
    _, params, bias = split_model(MODEL, 0)
    return params, bias


@functools.cache
def alone():
    generator = Generator(MODEL, one_device(), precision="float32")
    return generator, generator.prepare(*weights())


def answer_alone(request):
    generator, prepared = alone()
    return generator.generate(prepared, [request.prompt], request.max_new_tokens, request.sampling,
                              tuple(request.stop_ids)).run()[0]


def make_engine(sizes=SMALL, mesh=None, targets=Targets(), chunks=(8, 16), **options):
    on_mesh = ModelOnMesh(MODEL, mesh or one_device(), precision="float32", **options)
    return Engine(on_mesh, on_mesh.prepare(*weights()), sizes, targets, chunks)


def requests(count, seed=0, sampling=GREEDY):
    """Prompts of 1 to 28 tokens, every other with the same beginning; 1 to 19 new ones."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, MODEL.vocab_size, 20)
    made = []
    for number in range(count):
        prompt = rng.integers(0, MODEL.vocab_size, rng.integers(1, 24))
        if number % 2:
            prompt = np.concatenate([common, prompt[:8]])
        made.append(Request(prompt.astype(np.int32), int(rng.integers(1, 20)), sampling, user=str(number % 3)))
    return made


@pytest.mark.parametrize(("sampling", "speculative"), [(GREEDY, True), (Sampling(temperature=1.0, seed=3), False)],
                         ids=["greedy, speculative", "sampled"])
def test_several_prompts_are_read_at_once(sampling, speculative):
    """In four lanes of a quarter of the longest chunk; a prompt that fills that is read by itself."""
    engine = make_engine(Sizes(rows=8, pages=24, page_size=16, context=48), chunks=(4, 16), speculative=speculative)
    asked = [dataclasses.replace(request, prompt=request.prompt[:5 + number % 4], max_new_tokens=4)
             for number, request in enumerate(requests(24, sampling=sampling)) if len(request.prompt) > 8]
    tickets = [engine.submit(request) for request in asked]
    engine.run()
    assert [ticket.tokens for ticket in tickets] == [answer_alone(request) for request in asked]
    by_themselves = 2 * len(asked)
    assert engine.totals.chunks < by_themselves / 2
    long = [Request(np.arange(32, dtype=np.int32) + at, 2, sampling) for at in range(4)]
    before = engine.totals.chunks
    for request in long:
        engine.submit(request)
    engine.run()
    assert engine.totals.chunks - before == 8


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_halves_of_rows_beside_each_other(speculative, eight_devices):
    """Prompts and steps alike: as many exchanges again as without, in an order of their own, and the same answers."""
    mesh = make_mesh(MeshConfig(data=1, scale_out=2, scale_up=2), eight_devices[:4])
    sizes = Sizes(rows=4, pages=12, page_size=16, context=48)
    engine = make_engine(sizes, mesh, chunks=(4, 16), dual=True, speculative=speculative)
    weights, state = engine._programs.shapes()
    for lower in (lambda count: engine._programs.lower_step(weights, state, count, 3),
                  lambda count: engine._programs.lower_read(weights, state, 4, 3, lanes=count)):
        alone, halves = (lower(count).as_text() for count in (1, 4))
        assert alone.count("optimization_barrier") == 0 < halves.count("optimization_barrier")
        assert alone.count("all_to_all") < halves.count("all_to_all")
    asked = requests(16)
    tickets = [engine.submit(request) for request in asked]
    engine.run()
    assert [ticket.tokens for ticket in tickets] == [answer_alone(request) for request in asked]


@pytest.mark.parametrize("options", [
    {}, {"speculative": True},
    pytest.param({"speculative": True, "mesh": (2, 2)}, marks=pytest.mark.slow)], ids=str)
def test_answers_are_those_of_each_request_alone(options, eight_devices):
    """Random arrivals and lengths, pages shared and taken away, and two of the requests cancelled on the way."""
    options = dict(options)
    if "mesh" in options:
        out, up = options["mesh"]
        options["mesh"] = make_mesh(MeshConfig(data=1, scale_out=out, scale_up=up), jax.devices()[:out * up])
    engine = make_engine(**options)
    asked = requests(16)
    arrivals = np.sort(np.random.default_rng(1).integers(0, 40, len(asked)))
    tickets, turn = [], 0
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None)
    try:
        while turn <= arrivals[-1] or engine.waiting or engine.running:
            tickets += [engine.submit(request) for request, at in zip(asked, arrivals, strict=True) if at == turn]
            if turn == 30:
                tickets[3].cancel()
                tickets[-1].cancel()
            engine.turn()
            turn += 1
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled, "everything was compiled before the first request"
    cancelled = 0
    for request, ticket in zip(asked, tickets, strict=True):
        want = answer_alone(request)
        if ticket.finish is Finish.CANCELLED:
            cancelled += 1
            assert ticket.tokens == want[:len(ticket.tokens)]
        else:
            assert (ticket.tokens, ticket.finish) == (want, Finish.LENGTH)
    totals = engine.totals
    assert cancelled >= 1
    assert totals.reused_tokens >= 16
    assert totals.preemptions >= 1 or "mesh" in options
    assert engine.free_pages == SMALL.pages * (4 if "mesh" in options else 1), "every page came back"
    assert totals.new_tokens == sum(len(ticket.tokens) for ticket in tickets)


def test_draws_depend_on_the_seed_alone():
    """Without drafts a sampled answer too is that of the request alone, though it lost its row on the way."""
    asked = [dataclasses.replace(request, sampling=Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1,
                                                            seed=number))
             for number, request in enumerate(requests(8, seed=3))]
    engine = make_engine()
    tickets = [engine.submit(request) for request in asked]
    engine.run()
    assert engine.totals.preemptions > 0
    for request, ticket in zip(asked, tickets, strict=True):
        assert ticket.tokens == answer_alone(request)


def test_an_answer_ends_at_its_stop_token_and_streams():
    request = requests(1, seed=5)[0]
    request = dataclasses.replace(request, max_new_tokens=19)
    whole = answer_alone(request)
    stop = whole[7]
    heard = []
    with make_engine() as engine:
        ticket = engine.submit(dataclasses.replace(request, stop_ids=frozenset([stop])),
                               lambda ids, finish: heard.append((list(ids), finish)))
        pieces = list(ticket)
        assert engine.submit(request).wait(timeout_s=60) == whole
    assert list(itertools.chain(*pieces)) == ticket.tokens == whole[:whole.index(stop) + 1]
    assert ticket.finish is Finish.STOP
    assert list(itertools.chain(*(ids for ids, _ in heard))) == ticket.tokens
    assert [finish for _, finish in heard][-1] is Finish.STOP
    assert ticket.arrived_s < ticket.first_token_s <= ticket.ended_s


def test_many_threads_ask_at_once():
    asked = requests(12, seed=7)
    answers = {}
    with make_engine() as engine:
        threads = [threading.Thread(target=lambda n=n: answers.update({n: engine.submit(asked[n]).wait(120)}))
                   for n in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number: answer_alone(request) for number, request in enumerate(asked)}


@pytest.mark.parametrize("cache", ["bf16", "float8", "int8"])
def test_every_format_of_the_cache_serves(cache):
    """Pages keep what a row of its own keeps: the same tokens as from such a cache, the prompt read in equal chunks."""
    asked = requests(6, seed=9)
    engine = make_engine(cache=cache)
    tickets = [engine.submit(request) for request in asked]
    engine.run()
    on_mesh = ModelOnMesh(MODEL, one_device(), precision="float32", cache=cache)
    model = nnx.merge(on_mesh.structure, on_mesh.prepare(*weights()))

    @jax.jit
    def next_token(tokens_Q, held, count):
        out = decode(model, tokens_Q[None], held, count[None])
        return jnp.argmax(model.logits(out.hidden_BQD[0, count - 1])), out.cache
    for request, ticket in zip(asked, tickets, strict=True):
        held, answer, left = LatentCache.empty(MODEL, 1, 48, cache, mtp=False), [], list(request.prompt)
        while len(answer) < request.max_new_tokens:
            now, left = left[:16], left[16:]
            padded = np.pad(np.array(now, np.int32), (0, 16 - len(now)))
            token, held = next_token(padded, held, np.int32(len(now)))
            if not left:
                answer.append(int(token))
                left = answer[-1:]
        assert ticket.tokens == answer


def test_an_engine_that_fails_says_so_to_everybody(monkeypatch):
    with make_engine() as engine:
        def fail(*_):
            raise FloatingPointError("broken")
        monkeypatch.setattr(engine._programs, "step", fail)
        ticket = engine.submit(requests(1)[0])
        with pytest.raises(RuntimeError, match="broken"):
            ticket.wait(60)
        assert ticket.finish is Finish.ERROR
        with pytest.raises(RuntimeError, match="the engine has failed: broken"):
            engine.submit(requests(1)[0])


def test_a_listener_that_fails_ends_its_own_request_only(capsys):
    asked = [dataclasses.replace(request, max_new_tokens=15) for request in requests(2)]
    with make_engine() as engine:
        failing = engine.submit(asked[0], lambda ids, finish: 1 / 0)
        assert engine.submit(asked[1]).wait(60) == answer_alone(asked[1])
        failing.wait(60)
    assert failing.finish is Finish.CANCELLED
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_what_it_was():
    """3,000 requests, which is an hour of one in 1.2 s: no array, page, thread or megabyte more than after the first
    300."""
    asked = requests(50, seed=21)
    with make_engine() as engine:
        for hundred in range(30):
            for ticket in [engine.submit(asked[number % 50]) for number in range(100)]:
                ticket.wait(120)
            if hundred == 2:
                arrays, threads, before = arrays_at_rest(), threading.active_count(), resident_bytes()
        assert arrays_at_rest() <= arrays
        assert threading.active_count() == threads
        assert engine.free_pages == SMALL.pages
        assert resident_bytes() < before + 8 * 2 ** 20  # the allocators' own


def arrays_at_rest():
    """The least of some looks: after the last answer the engine's thread may still be ending its turn."""
    found = []
    for _ in range(20):
        found.append(len(jax.live_arrays()))
        time.sleep(0.01)
    return min(found)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_cannot_be_served_is_refused():
    engine = make_engine(dataclasses.replace(SMALL, waiting=2))
    prompt = np.array([1, 2, 3], np.int32)
    for request, says in [
            (Request(np.array([], np.int32), 3), "a prompt of 0 tokens"), (Request(prompt, 0), r"max_new_tokens \(0\)"),
            (Request(np.array([1, MODEL.vocab_size], np.int32), 3), "outside model.vocab_size"),
            (Request(prompt, 46), r"engine.context\).* 45 at most")]:
        with pytest.raises(ConfigError, match=says):
            engine.submit(request)
    for _ in range(2):
        engine.submit(Request(prompt, engine.room - len(prompt)))  # as many as there may be
    with pytest.raises(Busy):
        engine.submit(Request(prompt, 3))
    assert (engine.totals.requests, engine.totals.refused) == (2, 1)
    on_mesh = engine.on_mesh
    with pytest.raises(ConfigError, match=r"engine.context \(99999\) is more than the model's window"):
        Engine(on_mesh, on_mesh.prepare(*weights()), Sizes(rows=1, pages=10 ** 5, context=99999))
