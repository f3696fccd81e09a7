"""Prefill and decode apart give the answers of one engine, and lose none when a worker is lost."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.disaggregated import Disaggregated
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_slots import deployment_on, expert_layers
from dsv3_jax.inference.handover import Handover, handover_from, handover_message, pack, unpack
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.request import Finish, Request
from dsv3_jax.inference.router import Router
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Busy, Sizes
from dsv3_jax.inference.workers import ROUTER
from dsv3_jax.mesh import make_mesh
from tests.dsv3_jax.inference.test_engine import MODEL, SMALL, answer_alone, requests, weights

SIZES = Sizes(rows=3, pages=30, page_size=4, context=48)


def engine(out, up, first=0, sizes=SIZES, chunks=(16,), share=1, redundant=None, **options):
    """On out*up*share devices from number `first` on; so many devices share a prompt."""
    mesh = make_mesh(MeshConfig(data=1, scale_out=out, scale_up=up, context=share),
                     jax.devices()[first:first + out * up * share])
    rest = {k: options.pop(k) for k in ("hand_over", "receives") if k in options}
    if redundant is not None:
        options["placement"] = Placement.in_order(expert_layers(MODEL), deployment_on(MODEL, mesh, redundant))
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32", reads_only="hand_over" in rest, **options)
    return Engine(on_mesh, on_mesh.prepare(*weights()), sizes, chunks=chunks, **rest)


class System(Disaggregated):
    """With engines of the test's model."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def prefill(self, name, *mesh, **options):
        self.add_prefill(name, lambda push: engine(*mesh, hand_over=push, **self.options, **options))

    def decode(self, name, *mesh, **sizes):
        self.add_decode(name, engine(*mesh, receives=True, **self.options, **sizes))


@pytest.fixture
def system(request):
    with System(**getattr(request, "param", {})) as made:
        yield made


def settled(system):
    """When every page came back, within a minute."""
    for _ in range(600):
        if all(each.free_pages == each.sizes.pages * each._devices for each in system.engines.values()):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("system", [{}, pytest.param({"speculative": True}, marks=pytest.mark.slow)], ids=str,
                         indirect=True)
def test_answers_are_those_of_one_engine(system, eight_devices):
    """Two devices read, four decode: other meshes, and another degree of expert parallelism."""
    system.prefill("prefill", 1, 2)
    system.decode("decode", 2, 2, 2)
    asked = requests(14)
    heard = []
    tickets = [system.submit(request, lambda ids, finish: heard.extend(ids)) for request in asked]
    for request, ticket in zip(asked, tickets, strict=True):
        assert ticket.wait(120) == answer_alone(request)
        assert ticket.finish is Finish.LENGTH
    assert len(heard) == sum(request.max_new_tokens for request in asked)
    assert system.router.totals.repeated == 0
    assert settled(system)
    reads, steps = system.engines["prefill"].totals, system.engines["decode"].totals
    assert reads.steps == 0
    assert reads.reused_tokens > 0
    assert steps.chunks == 0
    assert system.totals.new_tokens == steps.new_tokens + reads.new_tokens == len(heard)


@pytest.mark.parametrize("options", [
    {},
    pytest.param({"chunks": (4, 16), "dual": True, "redundant": 8}, marks=pytest.mark.slow),
    pytest.param({"cache": "float8", "share": 4}, marks=pytest.mark.slow)], ids=str)
def test_devices_may_share_prompts(system, eight_devices, options):
    """Two at each chunk, which is in the pages of both; and four, where a page is of several devices' tokens."""
    options = {"share": 2, **options}
    if "cache" in options:
        system.options = {"cache": options.pop("cache")}
    system.prefill("prefill", 2 if options["share"] == 2 else 1, 1, **options)
    system.decode("decode", 1, 1, 4)
    asked = requests(8, seed=5)
    tickets = [system.submit(request) for request in asked]
    alone = answer_alone if not system.options else (lambda request: system.engines["decode"].submit(request).wait(120))
    for request, ticket in zip(asked, tickets, strict=True):
        assert ticket.wait(120) == alone(request)
    assert settled(system)
    assert system.engines["prefill"].totals.steps == system.engines["decode"].totals.preemptions == 0
    assert system.engines["prefill"].totals.read_tokens > 0


def test_what_cannot_be_shared_is_refused(eight_devices):
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32", reads_only=True)
    with pytest.raises(ConfigError, match=r"mesh.context \(2\) is for engines that only read prompts"):
        Engine(on_mesh, on_mesh.shapes(), SIZES)
    with pytest.raises(ConfigError, match=r"mesh.context \(2\) must divide each of engine.chunks \(8, 15\)"):
        Engine(on_mesh, on_mesh.shapes(), SIZES, chunks=(8, 15), hand_over=print)


def test_nothing_is_lost_or_answered_twice_when_workers_are_lost(system, eight_devices):
    """One of two decode workers goes in the middle of answers, then the only prefill worker, and another comes."""
    system.prefill("prefill", 1, 1)
    system.decode("decode 1", 1, 1, 1)
    system.decode("decode 2", 1, 1, 2)
    asked = [dataclasses.replace(request, max_new_tokens=18) for request in requests(12, seed=11)]
    heard = [[] for _ in asked]
    tickets = [system.submit(request, lambda ids, _, n=n: heard[n].extend(ids))
               for n, request in enumerate(asked)]
    while min(sum(len(ids) > 1 for ids in heard), 3) < 3:
        time.sleep(0.01)
    system.remove("decode 1")
    while sum(ticket.finish is not None for ticket in tickets) < 3:
        time.sleep(0.01)
    system.remove("prefill")
    late = system.submit(asked[0])
    system.prefill("prefill again", 1, 1, 3)
    for request, ticket, ids in zip(asked, tickets, heard, strict=True):
        assert ticket.wait(120) == ids == answer_alone(request)
    assert late.wait(120) == answer_alone(asked[0])
    assert system.router.totals.repeated > 0
    assert system.router.totals.answered == 13
    assert settled(system)


def test_a_request_that_is_cancelled_frees_its_pages_on_both_sides(system, eight_devices):
    system.prefill("prefill", 1, 1)
    system.decode("decode", 1, 1, 1, sizes=dataclasses.replace(SMALL, rows=1))
    prompt = np.arange(20, dtype=np.int32)
    tickets = [system.submit(Request(prompt + n, 24, Sampling(temperature=0))) for n in range(4)]
    next(iter(tickets[0]))
    for ticket in (tickets[0], tickets[2]):  # one decodes, the other waits in the prefill worker's pages
        ticket.cancel()
        assert ticket.wait(60) is ticket.tokens
        assert ticket.finish is Finish.CANCELLED
    for number in (1, 3):
        assert len(tickets[number].wait(60)) == 24
    assert settled(system)
    assert system.waiting == system.running == 0


def test_an_engine_that_fails_is_left(system, eight_devices, monkeypatch):
    """Its requests go on elsewhere, and nobody sends it another."""
    system.prefill("prefill", 1, 1)
    system.decode("broken", 1, 1, 1)
    monkeypatch.setattr(system.engines["broken"]._programs, "step", lambda *_: 1 / 0)
    ticket = system.submit(requests(1)[0])
    while system.engines["broken"].error is None:
        time.sleep(0.01)
    system.decode("sound", 1, 1, 2)
    assert ticket.wait(60) == answer_alone(ticket.request)
    assert system.submit(ticket.request).wait(60) == ticket.tokens
    assert system.engines["broken"].totals.requests == 1


def test_a_router_has_its_limits():
    """Without workers requests wait, as many as may; one that no worker can serve ends with the reason."""
    sent = []
    router = Router(lambda to, header, handover: sent.append((to, header)), waiting=2)
    first, _ = (router.submit(Request(np.arange(3, dtype=np.int32), 4)) for _ in range(2))
    with pytest.raises(Busy, match="2 requests are waiting"):
        router.submit(Request(np.arange(3, dtype=np.int32), 4))
    router.joined("p", prefill=True)
    assert not sent, "nobody decodes yet"
    router.joined("d", prefill=False)
    assert [(to, header["kind"], header["deliver_to"]) for to, header in sent] == [("p", "read", "d")] * 2
    job = {"job": sent[0][1]["job"], "attempt": 0, "from": "p"}
    router.handle({**job, "kind": "refused", "why": "request", "says": "too long"})
    with pytest.raises(RuntimeError, match="too long"):
        first.wait(1)
    second = {"job": sent[1][1]["job"], "attempt": 0, "from": "d"}
    router.handle({**second, "kind": "placed", "ids": [7]})
    router.handle({**second, "kind": "tokens", "at": 0, "ids": [7], "finish": None})
    router.handle({**second, "kind": "tokens", "at": 1, "ids": [8], "finish": None})
    router.lost("d")
    router.handle({**second, "kind": "tokens", "at": 2, "ids": [9], "finish": "length"})
    assert router.totals.dropped == 1
    router.joined("d", prefill=False)
    sent[-1][1]["from"] = "p"
    router.handle({**sent[-1][1], "kind": "refused", "why": "busy", "says": "later"})
    before = len(sent)
    router.joined("d", prefill=False)
    assert sent[before][1]["attempt"] == 2
    again = sent[-1][1]
    assert (again["attempt"], again["request"]["prompt"], again["request"]["max_new_tokens"]) == (2, [0, 1, 2, 7, 8], 2)


def test_messages_arrive_as_they_were_sent():
    rng = np.random.default_rng(0)
    request = Request(np.array([5, 6], np.int32), 9, Sampling(temperature=0.5, seed=3), frozenset([1, 2]), "me")
    arrays = tuple(rng.integers(-9, 9, (2, 3, 4, width)).astype(dtype)
                   for width, dtype in ((8, np.int8), (1, np.float32), (2, jax.numpy.bfloat16)))
    for window in (None, (rng.normal(size=(2, 8)).astype(np.float32), np.array([3, 4], np.int32))):
        sent = Handover(request, 11, arrays, window)
        header, parts = unpack(handover_message({"kind": "take", "job": 1, "attempt": 2, "from": ROUTER}, sent))
        got = handover_from(header, parts)
        assert (header["job"], got.first) == (1, 11)
        assert dataclasses.replace(got.request, prompt=request.prompt) == request
        for a, b in zip((*got.arrays_LJSx, *(got.window or ()), got.request.prompt),
                        (*arrays, *(window or ()), request.prompt), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert got.nbytes == sent.nbytes == sum(x.nbytes for x in (*arrays, *(window or ())))
    whole = pack({"kind": "x"}, [np.zeros(3)])
    for broken, says in ((whole[:-1], "ends within"), (whole + b"1", "1 bytes that"), (whole[:4], "no header")):
        with pytest.raises(ValueError, match=says):
            unpack(broken)
