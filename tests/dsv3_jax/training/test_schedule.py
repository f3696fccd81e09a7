"""Schedules against the figures of paper 2, section 4.2."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.config import BatchConfig, ScheduleConfig
from dsv3_jax.presets import RUNS
from dsv3_jax.training.schedule import Position, batch_sequences, settings, total_sequences, walk

PAPER = RUNS["deepseek_v3"]
TRILLION = 1 / 14.8


@pytest.mark.parametrize(("step", "share", "rate"), [
    (0, 0.0, 2.2e-4 / 2000), (999, 0.001, 1.1e-4), (1999, 0.002, 2.2e-4), (5000, 0.1, 2.2e-4),
    (10 ** 5, 9.99 * TRILLION, 2.2e-4), (10 ** 5, 12.15 * TRILLION, 1.21e-4), (10 ** 5, 14.4 * TRILLION, 2.2e-5),
    (10 ** 5, 14.7 * TRILLION, 7.3e-6)])
def test_learning_rate_of_the_paper(step, share, rate):
    assert settings(PAPER.schedule, step, share).learning_rate == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("trillions", "speed", "weight"), [(0, 1e-3, 0.3), (9.9, 1e-3, 0.3), (10.1, 1e-3, 0.1),
                                                            (14.2, 1e-3, 0.1), (14.4, 0, 0.1)])
def test_bias_speed_and_mtp_weight_of_the_paper(trillions, speed, weight):
    got = settings(PAPER.schedule, 10 ** 5, trillions * TRILLION)
    assert (got.bias_speed, got.mtp_weight) == (speed, weight)


def test_the_paper_run_reads_its_tokens():
    """The whole schedule walked: 14.8T tokens, batch 3072 at first, 15360 from 469B tokens on."""
    assert total_sequences(PAPER) * 4096 == pytest.approx(14.8e12, rel=0.01)
    tokens, ramp_end = 0, None
    for _, sequences, _ in walk(PAPER, Position()):
        assert sequences % PAPER.batch.micro_batch == 0
        ramp_end = tokens if ramp_end is None and sequences == 15360 else ramp_end
        tokens += sequences * 4096
    assert next(walk(PAPER, Position()))[1] == 3072
    assert ramp_end == pytest.approx(469e9, rel=0.02)
    assert tokens == pytest.approx(14.8e12, rel=0.01)


def test_walk_resumes_where_it_stood():
    config = dataclasses.replace(RUNS["tiny"], steps=30, batch=BatchConfig(
        sequences=16, sequence_length=64, micro_batches=4, ramp_from=4, ramp_until=0.5))
    whole = list(walk(config, Position()))
    assert len(whole) == 30
    assert list(walk(config, whole[11][0])) == whole[11:]
    assert {sequences for _, sequences, _ in whole} == {4, 8, 12, 16}


def test_batch_never_exceeds_its_bounds():
    batch = BatchConfig(sequences=64, sequence_length=8, micro_batches=8, ramp_from=8, ramp_until=0.25)
    sizes = [batch_sequences(batch, done, 1000) for done in range(0, 1000, 10)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (8, 64)


def test_constant_schedule_does_not_depend_on_the_length_of_the_run():
    constant = ScheduleConfig(warmup_steps=2, constant_until=1, cosine_until=1, floor_until=1, bias_until=1,
                              late_mtp_from=1)
    assert settings(constant, 5, 0.1) == settings(constant, 5, 1.5)
