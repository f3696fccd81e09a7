"""An engine with replicas of experts answers as one without, balances what it measures, and moves experts meanwhile."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.between_turns import BetweenTurns
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_balance import imbalance
from dsv3_jax.inference.expert_slots import deployment_on, expert_layers
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.request import Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS

# Large weights, so that float32's rounding decides no choice of a token.
MODEL = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2, initializer_range=0.2)
SIZES = Sizes(rows=4, pages=16, page_size=12, context=48)
HOT = np.array([0, 1, 5])
"""Experts that nearly all tokens choose."""


@functools.cache
def weights():
    """With a router that is biased."""
    _, params, bias = split_model(MODEL, 0)
    bias_E = np.zeros(MODEL.n_routed_experts, np.float32)
    bias_E[HOT] = 0.5
    return params, jax.tree.map(lambda x: x + bias_E, bias)


def mesh_of(scale_out, scale_up):
    return make_mesh(MeshConfig(data=1, scale_out=scale_out, scale_up=scale_up), jax.devices()[:scale_out * scale_up])


def make_engine(shape, redundant, by_group=False, speculative=False, rebalance_every_s=None, dual=False):
    mesh = mesh_of(*shape)
    placement = Placement.in_order(expert_layers(MODEL), deployment_on(MODEL, mesh, redundant, by_group))
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32", speculative=speculative, placement=placement,
                          dual=dual)
    return Engine(on_mesh, on_mesh.prepare(*weights()), SIZES, chunks=(16,), rebalance_every_s=rebalance_every_s)


@functools.cache
def requests():
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, MODEL.vocab_size, rng.integers(1, 28)).astype(np.int32), int(rng.integers(1, 16)),
                    Sampling(temperature=0)) for _ in range(24)]


@functools.cache
def answers_alone():
    generator = Generator(MODEL, mesh_of(1, 1), precision="float32")
    prepared = generator.prepare(*weights())
    return [generator.generate(prepared, [request.prompt], request.max_new_tokens, request.sampling).run()[0]
            for request in requests()]


def serve(engine, between=lambda turn: None):
    """Answers to all requests, which come one a turn; `between` is called before each."""
    tickets, turn = [], 0
    while turn < len(requests()) or engine.waiting or engine.running:
        if turn < len(requests()):
            tickets.append(engine.submit(requests()[turn]))
        between(turn)
        engine.turn()
        turn += 1
    return [ticket.tokens for ticket in tickets]


@pytest.mark.parametrize("case", [
    pytest.param({"shape": (2, 2), "redundant": 8, "speculative": True}, marks=pytest.mark.slow),
    {"shape": (2, 2), "redundant": 8, "by_group": True, "dual": True},
    {"shape": (1, 2), "redundant": 2},
    pytest.param({"shape": (2, 4), "redundant": 16, "speculative": True}, marks=pytest.mark.slow)], ids=str)
def test_a_rebalance_in_the_middle_of_a_load(case, eight_devices):
    """Answers stay those of a model without replicas, nothing compiles, and devices' loads become what is expected."""
    engine = make_engine(**case)
    compiled, done = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None)

    def rebalance_once(turn):
        if turn == 20:
            done.append((engine.imbalance(), engine.rebalance()))
    try:
        got = serve(engine, rebalance_once)
        expected_L = engine.rebalance().expected_L
        again = serve(engine)
        after_L = engine.imbalance()
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled, "everything was compiled before the first request"
    assert got == again == answers_alone()
    (measured_L, report), = done
    np.testing.assert_array_equal(measured_L, report.before_L)
    layers = slice(None if case.get("speculative") else MODEL.num_moe_layers)  # that serve
    assert report.replicas > 0
    assert report.layers == len(report.before_L[layers])
    assert report.moved_bytes == report.replicas * 3 * 4 * MODEL.hidden_size * MODEL.moe_intermediate_size
    assert report.between_nodes_bytes <= report.moved_bytes
    assert engine.totals.rebalances == 2
    assert engine.totals.moved_bytes >= report.moved_bytes
    # What is measured is a sample of n tokens a device: within three deviations of n draws.
    deviation_L = 1 / np.sqrt(engine._balance.device_LM.mean(axis=1)[layers])
    assert np.all(np.abs(after_L - expected_L)[layers] < 3 * deviation_L)
    assert np.all(after_L[layers] < report.before_L[layers] - 3 * deviation_L)


def test_a_served_engine_rebalances_by_itself(eight_devices):
    """From threads of its own, a layer between two turns."""
    engine = make_engine((1, 2), 6, rebalance_every_s=0.05)
    with engine:
        tickets = [engine.submit(request) for request in requests()]
        assert [ticket.wait(120) for ticket in tickets] == answers_alone()
        deadline = time.monotonic() + 60
        while engine.totals.rebalances < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert np.all(engine.imbalance() >= 1)
    assert engine.totals.rebalances >= 2
    assert engine.totals.moved_bytes > 0
    assert serve(engine) == answers_alone(), "stopped, it goes on turn by turn"


def test_pieces_are_done_one_a_turn_and_cancelled_at_the_end():
    between, done = BetweenTurns(), []
    ends = [between.put(functools.partial(done.append, number)) for number in range(3)]
    assert between
    assert between.do_one()
    assert done == [0]
    assert ends[0].done()

    def fail():
        raise FloatingPointError("broken")
    failing = BetweenTurns()
    end = failing.put(fail)
    with pytest.raises(FloatingPointError):
        failing.do_one()
    assert isinstance(end.exception(), FloatingPointError)
    between.cancel()
    assert [end.cancelled() for end in ends] == [False, True, True]
    assert not between.do_one()


def test_loads_without_tokens_are_balanced():
    np.testing.assert_array_equal(imbalance(np.array([[0.0, 0.0], [1.0, 3.0]])), [1.0, 1.5])


def test_an_engine_without_a_placement_cannot_rebalance():
    on_mesh = ModelOnMesh(MODEL, mesh_of(1, 1), precision="float32")
    with pytest.raises(ConfigError, match=r"engine.rebalance_every_s \(60\) needs a model with a placement"):
        Engine(on_mesh, on_mesh.prepare(*weights()), SIZES, rebalance_every_s=60.0)
