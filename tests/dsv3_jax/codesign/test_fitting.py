"""The search for what fits, on a made-up memory so that it takes no compiler."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign import fitting
from dsv3_jax.codesign.fitting import Attempt, first_that_fits, micro_batch_counts, search
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.config import BatchConfig, MeshConfig
from dsv3_jax.presets import RUNS

POD = parse_pod("h100:2x4")
RUN = dataclasses.replace(RUNS["tiny"], batch=BatchConfig(sequences=192, sequence_length=64),
                          mesh=MeshConfig(scale_out=2, scale_up=4))
COST = {"none": 16, "paper": 8, "experts": 4, "full": 1}
"""GiB for each sequence of a device in a micro-batch; 40 more for what zero1 gathers."""


@pytest.fixture
def tried(monkeypatch):
    tried: list[str] = []

    def attempt(change, config, pod, preset=""):
        tried.append(change)
        gathered = 40 if config.mesh.zero == "zero1" else 0
        peak = int((COST[config.recompute] * config.batch.micro_batch / 8 + gathered) * fitting.GIB)
        return Attempt(change, config, peak, peak <= pod.hardware.hbm_bytes, None)
    monkeypatch.setattr(fitting, "attempt", attempt)
    return tried


def test_micro_batches_divide_batch_and_devices():
    assert micro_batch_counts(RUN, POD) == [1, 2, 3, 4, 6, 8, 12, 24]


def test_search_finds_the_largest_micro_batch_of_each_level(tried):
    """79.1 GiB: 39 for activations. 24, 12, 8, 6, ... sequences a device: none 2, paper 4, experts 8, full 24."""
    best = search(RUN, POD, lambda line: None)
    assert [(a.config.recompute, a.config.batch.micro_batch // 8) for a in best] == [
        ("none", 2), ("paper", 4), ("experts", 8), ("full", 24)]
    assert len(tried) == len(set(tried)) <= 10


def test_a_level_that_saves_nothing_over_a_milder_one_is_left_out(tried, monkeypatch):
    monkeypatch.setitem(COST, "experts", 8)
    assert [a.config.recompute for a in search(RUN, POD, lambda line: None)] == ["none", "paper", "full"]


def test_remedies_go_from_mild_to_strong_and_stop_at_the_first_that_fits(tried):
    lines: list[str] = []
    asked = dataclasses.replace(RUN, recompute="experts")
    attempts = first_that_fits(asked, POD, lines.append)
    assert tried == ["--recompute full"]
    assert attempts[-1].fits
    assert lines[0].startswith("tried --recompute full peak_gib 64.00 of 79.11 fits true")


def test_remedies_are_combined_when_none_is_enough(tried, monkeypatch):
    monkeypatch.setitem(COST, "full", 10)
    attempts = first_that_fits(dataclasses.replace(RUN, recompute="experts"), POD, lambda line: None)
    assert tried[:4] == ["--recompute full", "--mesh.zero full", "--batch.micro-batches 2",
                         "--recompute full --mesh.zero full"]
    assert attempts[-1].change == "--recompute full --mesh.zero full --batch.micro-batches 4"
    assert attempts[-1].fits
