"""Progress between failures against a simulation, and the best interval against a search."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from dsv3_jax.codesign.failures import (
    LLAMA_3_DEVICE_SECONDS,
    Reliability,
    best_goodput,
    best_interval,
    checkpoint_floor,
    goodput,
    youngs_interval,
)
from dsv3_jax.config import ConfigError

SHAKY = Reliability(device_seconds=8000.0, checkpoint=5.0, detection=10.0, restart=7.0)
DEVICES = 80  # 100 s between failures


def played(interval: float, between: float, reliability: Reliability, cycles: int) -> float:
    """Interval by interval: failures come at random; each costs what was begun, and the pause, in which more can come.
    """
    random = np.random.default_rng(0)
    now, failure = 0.0, random.exponential(between)
    for _ in range(cycles):
        end = now + interval + reliability.checkpoint
        while failure < end:
            start = failure + reliability.detection + reliability.restart
            failure += random.exponential(between)
            while failure < start:
                start = failure + reliability.detection + reliability.restart
                failure += random.exponential(between)
            end = start + interval + reliability.checkpoint
        now = end
    return cycles * interval / now


@pytest.mark.parametrize("interval", [10.0, 40.0, 150.0])
def test_goodput_against_a_run(interval):
    """20,000 intervals: an error of a percent."""
    assert goodput(DEVICES, interval, SHAKY) == pytest.approx(played(interval, 100.0, SHAKY, 20_000), rel=0.03)


@pytest.mark.parametrize("devices", [1, DEVICES, 800, 80_000])
def test_best_interval_is_the_best(devices):
    best, high = best_interval(devices, SHAKY), best_goodput(devices, SHAKY)
    assert high == goodput(devices, best, SHAKY)
    assert all(goodput(devices, best * factor, SHAKY) <= high for factor in np.geomspace(0.2, 5, 101))
    slower = dataclasses.replace(SHAKY, detection=0.0, restart=1000.0)
    assert best_interval(devices, slower) == best


def test_young_where_checkpoints_are_short():
    """Young's is Daly's first term: off by sqrt(checkpoint / (18 M)) and less."""
    quick = dataclasses.replace(SHAKY, checkpoint=1e-4)
    assert best_interval(DEVICES, quick) == pytest.approx(youngs_interval(DEVICES, quick), rel=1e-3)
    assert youngs_interval(DEVICES, SHAKY) == pytest.approx(math.sqrt(2 * 5 * 100))


def test_limits():
    assert SHAKY.between(DEVICES) == 100
    assert dataclasses.replace(SHAKY, retried=0.75).between(DEVICES) == 400
    never = dataclasses.replace(SHAKY, retried=1.0)
    assert goodput(DEVICES, 45.0, never) == 0.9
    assert best_interval(DEVICES, never) == math.inf
    assert best_goodput(DEVICES, never) == 1
    assert goodput(DEVICES, 1e6, SHAKY) == 0  # never finished
    lasting = dataclasses.replace(SHAKY, device_seconds=1e15)
    assert goodput(DEVICES, 45.0, lasting) == pytest.approx(0.9)


def test_failures_grow_with_the_system():
    """Paper 1 section 6.1; Llama 3's 16,384 GPUs failed every three hours."""
    assert Reliability().between(16_384) / 3600 == pytest.approx(3.09, abs=0.01)
    assert Reliability().between(2048) == 8 * Reliability().between(16_384)
    shares = [best_goodput(devices, Reliability()) for devices in (2048, 8192, 65_536)]
    assert shares[0] > shares[1] > shares[2] > 0
    assert round(LLAMA_3_DEVICE_SECONDS / 3600) == 50_677


def test_what_sooner_and_again_buy():
    """No less for what is better, and all of it together most."""
    now = Reliability()
    sooner, again = dataclasses.replace(now, detection=10.0), dataclasses.replace(now, retried=0.1)
    both = dataclasses.replace(sooner, retried=0.1)
    assert best_goodput(16_384, now) < best_goodput(16_384, again) < best_goodput(16_384, both)
    assert best_goodput(16_384, now) < best_goodput(16_384, sooner) < best_goodput(16_384, both)


def test_checkpoint_through_the_storage_nics():
    assert checkpoint_floor(800e9, 16) == 8.0


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Reliability(device_seconds=0), r"device_seconds \(0\)"),
    (lambda: Reliability(checkpoint=0), r"checkpoint \(0\)"),
    (lambda: Reliability(detection=-1), r"detection \(-1\)"),
    (lambda: Reliability(restart=math.inf), r"restart \(inf\)"),
    (lambda: Reliability(retried=1.5), r"retried \(1.5\)"),
    (lambda: goodput(0, 1, SHAKY), r"devices \(0\)"),
    (lambda: goodput(1, 0, SHAKY), r"interval \(0\)"),
    (lambda: checkpoint_floor(-1, 8), r"state_bytes \(-1\)"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
