"""Stages, and a step's parts, against closed forms and all possible cuts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.codesign.planning.pipelined import (
    Pipeline,
    Stage,
    components,
    least_seconds,
    slot_seconds,
    split,
    units,
    weights_on_rank,
)
from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.schedule import Work
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make
from dsv3_jax.presets import MODELS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_no_cut_has_a_cheaper_dearest_stage(costs, stages):
    if stages > len(costs):
        with pytest.raises(ConfigError, match=rf"stages \({stages}\)"):
            split(costs, stages)
        return
    sizes = split(costs, stages)
    assert len(sizes) == stages
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1

    def dearest(ends):
        return max(sum(costs[begin:end]) for begin, end in itertools.pairwise((0, *ends, len(costs))))
    best = min(dearest(ends) for ends in itertools.combinations(range(1, len(costs)), stages - 1))
    assert dearest(tuple(itertools.accumulate(sizes))[:-1]) == best


def even(stages: int, **parts) -> Pipeline:
    return Pipeline((Stage(**{"forward": 1, "input": 1, "weight": 1, "exchange": 0, "exchange_back": 0} | parts),)
                    * stages, (("experts",),) * stages, {})


@pytest.mark.parametrize(("name", "bubble"), [("1f1b", 7 * 3), ("zb1p", 7 * (3 - 2)), ("dualpipe", 3 * (3 + 2 - 3))])
def test_bubbles_are_those_of_the_papers(name, bubble):
    """Paper 2, table 2, F = I = W = 1: (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W)."""
    told = components(even(8), make(name, 8, 20), 0.0, 1.0, 0.25)
    assert told.bubble == pytest.approx(bubble)
    assert told.seconds == pytest.approx(20 * 3 + bubble + 0.25)
    assert told.forward + told.backward + told.weight + told.together == pytest.approx(60)
    assert (told.together > 0) == (name == "dualpipe")


def test_parts_are_told_apart():
    told = components(even(4, forward=3, input=5, weight=2), make("1f1b", 4, 8), 0.0, 1.0, 0.0)
    assert (told.forward, told.backward, told.weight) == (24, 40, 16)


def test_exchanges_stand_alone_or_beside_computing():
    stages = even(2, exchange=4, exchange_back=6).stages
    assert slot_seconds((Work("F", 0, 0),), stages, 1.2) == 1 + 4
    assert slot_seconds((Work("B", 0, 0),), stages, 1.2) == 2 + 6
    assert slot_seconds((Work("I", 0, 0),), stages, 1.2) == 1 + 6
    assert slot_seconds((Work("W", 0, 0),), stages, 1.2) == 1
    pair = (Work("F", 0, 0), Work("B", 1, 1))
    assert slot_seconds(pair, stages, 1.2) == 10
    assert slot_seconds(pair, stages, 5.0) == 15
    assert slot_seconds(pair, even(2).stages, 5.0) == 3  # nothing is exchanged, no SM taken


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.sampled_from([2, 4]), st.integers(1, 3), st.data())
def test_no_step_is_shorter_than_said(name, ranks, many, data):
    """Stages of any lengths."""
    number = fitting_sizes(name, ranks, 2 * many * ranks)[1]
    table = make(name, ranks, number)
    part = st.floats(0.1, 3)
    stages = tuple(Stage(*data.draw(st.tuples(part, part, part, part, part))) for _ in range(table.stages))
    pipeline = Pipeline(stages, (("experts",),) * table.stages, {})
    told = components(pipeline, table, 0.0, 1.2, 0.0)
    assert least_seconds(pipeline, name, ranks, number, 1.2) <= told.seconds * (1 + 1e-9)


def test_the_least_of_1f1b_is_what_it_takes():
    told = components(even(4, exchange=2, exchange_back=2), make("1f1b", 4, 16), 0.0, 1.2, 0.0)
    assert least_seconds(even(4, exchange=2, exchange_back=2), "1f1b", 4, 16, 1.2) == pytest.approx(told.seconds, 0.05)


def test_transfers_lengthen_the_bubble():
    free, dear = (components(even(4), make("1f1b", 4, 8), transfer, 1.0, 0.0).bubble for transfer in (0.0, 0.5))
    assert dear >= free + 6 * 0.5  # there and back through three hops, and again where ranks take turns


def test_units_keep_heads_with_prediction():
    v3 = units(MODELS["deepseek_v3"])
    assert len(v3) == 62
    assert v3[0] == ("dense",)
    assert v3[3] == ("experts",)
    assert v3[-1] == ("head", "prediction", "head")
    assert units(MODELS["deepseek_v2_lite"])[-1] == ("head",)


def test_dualpipe_ranks_hold_two_stages():
    pipeline = Pipeline(even(4).stages, (("dense",), ("experts",), ("experts",), ("head",)), {})
    weights = {"dense": 1.0, "experts": 10.0, "head": 5.0}
    assert weights_on_rank(pipeline, make("1f1b", 4, 8), weights) == 10
    assert weights_on_rank(pipeline, make("dualpipe", 4, 8), weights) == 20
    assert weights_on_rank(pipeline, None, weights) == 26
    assert weights_on_rank(pipeline, make("dualpipev", 2, 4), weights) == 20
