"""Two kinds of traffic on one link, against closed forms and against steps of fixed length."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dsv3_jax.codesign.contention import (
    Phase,
    Port,
    _arrivals,
    busy_share,
    decode_step,
    simulate,
    slowdown_at_most,
    slowdown_of_one,
    transfer_capacity,
    undisturbed_seconds,
)
from dsv3_jax.config import ConfigError


@pytest.mark.parametrize(("port", "together"), [
    (Port(64, 50, 64), (32, 32)),
    (Port(64, 50, 20), (44, 20)),  # what the transfer leaves
    (Port(64, 20, 64), (20, 44)),
    (Port(64, 50, 14), (50, 14)),  # both fit
    (Port(64, 50, 64, "exchange_first"), (50, 14)),
    (Port(32, 50, 64, "exchange_first"), (32, 0)),
    (Port(32, 50, 64), (16, 16)),
    (Port(64, 50, 450, "nothing"), (50, 450)),
    (Port(math.nextafter(1e12, 2e12), 50, 64), (50, 64)),  # a link that is never full
])
def test_rates(port, together):
    assert port.rates(True, True) == pytest.approx(together)
    limit = math.inf if port.shared == "nothing" else port.link
    assert port.rates(True, False) == (min(port.nic, limit), 0)
    assert port.rates(False, True) == (0, min(port.host, limit))
    assert port.rates(False, False) == (0, 0)


def test_decode_step_of_paper_1_section_2_3_2():
    step = decode_step(Port())
    assert len(step) == 61 * 2 * 2
    assert undisturbed_seconds(Port(), step) == pytest.approx(14.757e-3, rel=1e-4)
    assert busy_share(Port(), step) == pytest.approx(1)
    assert busy_share(Port(), decode_step(Port(), 2.0)) == pytest.approx(0.5)
    assert undisturbed_seconds(Port(), decode_step(Port(), 2.0)) == pytest.approx(2 * 14.757e-3, rel=1e-4)


STEP = [Phase(50.0, 0.5), Phase(100.0, 3.0)]  # a second and two at 50 bytes/s; 1 s of computing alone at the end


@pytest.mark.parametrize("port", [Port(64, 50, 64, "exchange_first"), Port(64, 50, 64, "nothing"), Port(64, 50, 14),
                                  Port(200, 50, 64)])
def test_undisturbed_where_nothing_is_taken_away(port):
    outcome = simulate(port, STEP, load=10, size=20, devices=4, steps=5)
    np.testing.assert_allclose(outcome.steps, 4.0)
    assert outcome.transfers.size > 0
    assert outcome.transfers.min() >= 20 / port.rates(False, True)[1] * (1 - 1e-12)


def test_undisturbed_without_load():
    outcome = simulate(Port(64, 50, 64), STEP, load=0, size=20, devices=3, steps=2)
    np.testing.assert_allclose(outcome.steps, 4.0)
    assert outcome.transfers.size == 0


def test_never_a_pause_is_the_closed_form():
    """A device that is always exchanging; a transfer takes the time its half allows. 1% is what 2,000 arrivals leave
    of chance: the mean's standard error is a fifth of a slowdown of 1.127 over sqrt(2,000) or less."""
    port = Port(64, 50, 64)
    outcome = simulate(port, [Phase(5000.0, 0.0)], load=10, size=20, devices=1, steps=40, seed=1)
    assert outcome.transfers.size == pytest.approx(10 / 20 * outcome.steps.sum(), rel=0.1)
    assert outcome.steps.mean() / 100 == pytest.approx(slowdown_of_one(port, 10), rel=0.01)
    assert slowdown_of_one(port, 10) == pytest.approx(50 / (50 - 18 * 10 / 32))
    assert slowdown_of_one(port, 0) == 1
    assert slowdown_of_one(port, 32) == pytest.approx(slowdown_at_most(port)) == pytest.approx(50 / 32)


@pytest.mark.parametrize("shared", ["exchange_first", "nothing", "fair"])
def test_transfers_wait_as_in_a_queue_of_one_server(shared):
    """Arrivals at random, equal service: at half load rho / (2 (1 - rho)) = half a service time in the queue. Some
    2,000 transfers leave some percent of chance; with service times at random each would wait a whole one."""
    port = Port(64, 50, 64, shared)
    rate = port.rates(True, True)[1]
    outcome = simulate(port, [Phase(1000.0, 0.0)], load=rate / 2, size=rate, devices=1, steps=200, seed=2)
    assert outcome.transfers.size > 1800
    assert outcome.transfers.mean() == pytest.approx(1.5, rel=0.1)


def test_more_than_goes_through_never_ends():
    outcome = simulate(Port(64, 50, 64, "exchange_first"), [Phase(1000.0, 0.0)], load=40, size=20, devices=2, steps=20)
    assert np.isinf(outcome.transfers).any()
    assert transfer_capacity(Port(64, 50, 64, "exchange_first")) == 14
    assert transfer_capacity(Port(64, 50, 64, "exchange_first"), 0.5) == 39


def test_the_group_waits_for_its_last():
    """Transfers are longer than exchanges, as of caches they are. Of 200 devices one has a transfer at any time; one
    alone has one for 4/32 of its time."""
    port, step = Port(64, 50, 64), [Phase(2.5, 0.0)] * 20
    small = simulate(port, step, load=4, size=20, devices=1, steps=40)
    large = simulate(port, step, load=4, size=20, devices=200, steps=20)
    assert small.steps.mean() < 1.2
    assert large.steps.mean() == pytest.approx(slowdown_at_most(port), rel=0.02)
    assert large.steps.max() <= slowdown_at_most(port) * (1 + 1e-9)


@pytest.mark.parametrize(("ratio", "most"), [(0.0, 1.5625), (1.0, 1.5625), (1.25, 1.25), (1.5625, 1), (3, 1)])
def test_computing_hides_what_it_outlasts(ratio, most):
    port = Port(64, 50, 64)
    assert slowdown_at_most(port, ratio) == pytest.approx(most)
    step = [Phase(50.0, ratio)]
    outcome = simulate(port, step, load=31, size=1e6, devices=20, steps=10, seed=3)
    assert outcome.steps.max() <= undisturbed_seconds(port, step) * most * (1 + 1e-9)


@pytest.mark.parametrize("shared", ["fair", "exchange_first", "nothing"])
@pytest.mark.parametrize("compute", [0.0, 2.5])
def test_against_steps_of_fixed_length(shared, compute):
    """The same arrivals through a loop that knows no events. Each exchange before it and each transfer of its device
    puts an event off by a step or two: in all less than 0.1 s."""
    port, size, load, tick = Port(64, 50, 64, shared), 20.0, 12.0, 2e-3
    step = [Phase(50.0, compute), Phase(70.0, compute), Phase(50.0, 0.0)]
    outcome = simulate(port, step, load, size, devices=2, steps=3, seed=4)
    longest = 3 * undisturbed_seconds(port, step) * port.rates(True, False)[0] / port.rates(True, True)[0]
    arrivals_DJ = _arrivals(load / size, longest, 2, 4)
    ends, finished = _ticks(port, 8 * step, size, arrivals_DJ, tick)
    np.testing.assert_allclose(np.cumsum(outcome.steps), ends[2:9:3], atol=0.1)
    arrived = arrivals_DJ[arrivals_DJ < outcome.steps.sum()]
    assert len(arrived) > 5
    np.testing.assert_allclose(outcome.transfers, [finished[at] - at for at in arrived], atol=0.1)


def _ticks(port: Port, phases: list[Phase], size: float, arrivals_DJ: np.ndarray, tick: float):
    """Ends of phases, and when transfers were finished by when they came."""
    now, queues = 0.0, [list(row) for row in arrivals_DJ]
    remaining, ends, finished = [size, size], [], {}
    for phase in phases:
        start, left = now, [phase.received] * 2
        while max(left) > 0 or now < start + phase.compute - tick / 2:
            for device in range(2):
                exchange, transfer = port.rates(left[device] > 0, queues[device][0] <= now)
                left[device] -= exchange * tick
                remaining[device] -= transfer * tick
                if remaining[device] <= 0:
                    finished[queues[device].pop(0)] = now + tick
                    remaining[device] = size
            now += tick
        ends.append(now)
    return ends, finished


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Port(link=0), r"link \(0\)"),
    (lambda: Port(nic=-1.0), r"nic \(-1.0\)"),
    (lambda: Port(host=math.nan), r"host \(nan\)"),
    (lambda: Port(shared="by luck"), r"shared \(by luck\)"),
    (lambda: decode_step(Port(), -1), r"compute_ratio \(-1\)"),
    (lambda: decode_step(Port(), layers=0), r"layers \(0\)"),
    (lambda: simulate(Port(), STEP, -1, 1, 1, 1), r"load \(-1\)"),
    (lambda: simulate(Port(), STEP, 1, 0, 1, 1), r"size \(0\)"),
    (lambda: simulate(Port(), STEP, 1, 1, 0, 1), r"devices \(0\)"),
    (lambda: slowdown_of_one(Port(64, 50, 64), 33), r"load \(33\) must be at most the 32"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
