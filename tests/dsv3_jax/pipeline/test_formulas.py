"""Tables against published formulas: where they agree, and by how much they differ elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.pipeline.account import Durations, bubbles, parameter_copies
from dsv3_jax.pipeline.formulas import FORMULAS
from dsv3_jax.pipeline.schedule import peak_activations
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make

PART = st.integers(1, 40).map(lambda eighths: eighths / 8)  # sums of eighths are exact


@st.composite
def durations(draw) -> Durations:
    """Pairs from their longer half's time to that of both after each other."""
    forward, for_inputs, for_weights = draw(PART), draw(PART), draw(PART)
    least, most = max(forward, for_inputs + for_weights), forward + for_inputs + for_weights
    return Durations(forward, for_inputs, for_weights, least + draw(st.integers(0, 4)) / 4 * (most - least))


def waits(name: str, schedule, d: Durations) -> list[float]:
    """[rank]: what the tables wait, in closed form."""
    f, i, w, b = d.forward, d.input_backward, d.weight_backward, d.backward
    if name == "zb1p":
        return [(schedule.ranks - 1) * (f + i - min(w, f, i))] * schedule.ranks
    if name not in ("dualpipe", "dualpipev"):
        return [(schedule.ranks - 1) * (f + b)] * schedule.ranks
    k = schedule.stages // 2 - 1
    meet = k * (d.pair + f - w - min(w, i)) + max(0, k * (i - f) - f) * (k > 0)
    from_end = [min(rank, schedule.stages - 1 - rank) for rank in range(schedule.ranks)]
    return [meet - max(0, k - 1 - h) * (f + b - d.pair) for h in from_end]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_formulas_hold_where_the_parts_are_alike(name, ranks):
    """Paper 2, table 2, at F = I and a W that is shorter: the rank that waits longest, the one that keeps most."""
    schedule = make(name, *fitting_sizes(name, ranks, 20))
    d, formula = Durations(1, 1, 0.75, 2.25), FORMULAS[name]
    assert max(bubbles(schedule, d)) == formula.bubble(schedule, d)
    assert max(peak_activations(schedule)) == formula.activations(schedule)
    assert max(parameter_copies(schedule)) == formula.parameters


def test_the_papers_numbers_at_the_size_of_its_figure():
    """Written out: 8 stages, F = I = 1, W = 0.5, F&B = 2."""
    d = Durations(1, 1, 0.5, 2)
    told = {name: FORMULAS[name].bubble(make(name, 8, 20), d) for name in ("1f1b", "zb1p", "dualpipe")}
    assert told == {"1f1b": 7 * 2.5, "zb1p": 7 * 1.5, "dualpipe": 3 * (2 + 1.5 - 1.5)}
    assert [FORMULAS[name].activations(make(name, 8, 20)) for name in told] == [8, 8, 9]
    assert [FORMULAS[name].parameters for name in told] == [1, 1, 2]


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), ranks=st.sampled_from([1, 2, 3, 4, 6, 8]), more=st.integers(0, 9),
       d=durations())
def test_tables_wait_as_the_closed_form_says(name, ranks, more, d):
    ranks, least = fitting_sizes(name, ranks, 1)
    schedule = make(name, *fitting_sizes(name, ranks, least + more))
    assert bubbles(schedule, d) == pytest.approx(waits(name, schedule, d), rel=1e-12, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(["dualpipe", "dualpipev", "zb1p"]), ranks=st.sampled_from([4, 6, 8]), alike=st.booleans(),
       d=durations())
def test_table_and_formula_agree_exactly_if_a_forward_lasts_as_long(name, ranks, alike, d):
    """As an inputs' part, for a weights' part that is no longer. For zb1p it needn't."""
    if alike:
        d = Durations(d.input_backward, d.input_backward, d.weight_backward, d.backward)
    schedule = make(name, *fitting_sizes(name, ranks, 1))
    agrees = max(bubbles(schedule, d)) == pytest.approx(FORMULAS[name].bubble(schedule, d), rel=1e-9, abs=1e-9)
    if name == "zb1p":
        assert agrees == (d.weight_backward <= min(d.forward, d.input_backward))
    elif d.weight_backward <= d.input_backward:
        assert agrees == (d.forward == d.input_backward)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), ranks=st.integers(1, 9), micro_batches=st.integers(1, 30))
def test_as_many_activations_are_kept_as_the_formula_says(name, ranks, micro_batches):
    """Whatever the number of micro-batches: only GPipe's grow with it."""
    schedule = make(name, *fitting_sizes(name, ranks, micro_batches))
    assert max(peak_activations(schedule)) == FORMULAS[name].activations(schedule)
