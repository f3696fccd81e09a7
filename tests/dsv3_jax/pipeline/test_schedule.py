"""What a schedule is: timing against a simulation of its own kind, and tables that can't run."""

from __future__ import annotations

import heapq
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.pipeline.account import UNIT, Durations, bubbles
from dsv3_jax.pipeline.schedule import Schedule, Work, check, kinds_of, peak_activations, run
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make

MS = st.integers(1, 9)  # whole, so that sums are exact


def simulated(schedule: Schedule, durations: Durations, transfer: int) -> list[list[tuple[float, float]]]:
    """[rank][slot]: start and end, by events: whenever something ends or arrives, ranks that can start do. Knows what
    waits for what by itself: activations go up the stages, gradients down."""
    arrived: set[tuple[str, int, int]] = set()
    times: list[list[tuple[float, float]]] = [[] for _ in schedule.slots]
    busy_until = [0.0] * schedule.ranks
    events: list[tuple[float, int, tuple[str, int, int] | None]] = [(0.0, 0, None)]
    tie = itertools.count(1)
    last = schedule.stages - 1
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            arrival = heapq.heappop(events)[2]
            if arrival:
                arrived.add(arrival)
        for rank, slots in enumerate(schedule.slots):
            if busy_until[rank] > now or len(times[rank]) == len(slots):
                continue
            slot = slots[len(times[rank])]
            wanted = set()
            for kind, m, s in slot:
                if kind == "F":
                    wanted |= {("activation", m, s)} if s else set()
                elif kind == "W":
                    wanted |= {("input part done", m, s)}
                else:
                    wanted |= {("own forward", m, s)} | ({("gradient", m, s)} if s < last else set())
            if not wanted <= arrived:
                continue
            end = now + durations(rank, slot)
            times[rank].append((now, end))
            busy_until[rank] = end
            heapq.heappush(events, (end, next(tie), None))
            for kind, m, s in slot:
                to = s + 1 if kind == "F" else s - 1
                if kind == "F":
                    heapq.heappush(events, (end, next(tie), ("own forward", m, s)))
                if kind == "I":
                    heapq.heappush(events, (end, next(tie), ("input part done", m, s)))
                if kind != "W" and 0 <= to <= last:
                    late = end + (transfer if schedule.routes[m][to] != rank else 0)
                    heapq.heappush(events, (late, next(tie), ("activation" if kind == "F" else "gradient", m, to)))
    return times


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), ranks=st.integers(1, 8), micro_batches=st.integers(1, 20),
       durations=st.builds(Durations, MS, MS, MS, MS), transfer=st.integers(0, 3))
def test_times_are_those_of_a_simulation(name, ranks, micro_batches, durations, transfer):
    schedule = make(name, *fitting_sizes(name, ranks, micro_batches))
    timeline = run(schedule, durations, transfer)
    assert [[(timed.start, timed.end) for timed in row] for row in timeline.ranks] == simulated(
        schedule, durations, transfer)
    for rank, slots in enumerate(schedule.slots):
        busy = sum(durations(rank, slot) for slot in slots)
        assert timeline.busy(rank) == busy
        assert timeline.bubble(rank) == timeline.seconds - busy >= 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_transfer_costs_its_time(name, ranks):
    """A step gets longer by the transfers on its longest path, which has one between each two ranks at least."""
    schedule = make(name, *fitting_sizes(name, ranks, 20))
    plain, slower = (run(schedule, UNIT, transfer).seconds for transfer in (0.0, 0.1))
    assert slower >= plain + 0.1 * (ranks - 1)


def test_pairs_that_cover_each_other_shorten_the_step():
    schedule = make("dualpipe", 8, 20)
    covered, apart = (run(schedule, Durations(1, 1, 1, pair)).seconds for pair in (2, 3))
    assert covered == apart - 14  # the longest path has 11 pairs of the middle ranks and 3 of others


def test_activations_are_the_most_kept_at_once():
    """By hand: rank 0 of 1F1B keeps one a rank; split backwards keep theirs until the weights' part has run."""
    assert peak_activations(make("1f1b", 4, 8)) == [4, 3, 2, 1]
    assert peak_activations(make("zb1p", 4, 8)) == [4, 4, 4, 4]
    assert peak_activations(make("dualpipe", 4, 8)) == [5, 5, 5, 5]
    slots = tuple((work,) for work in (Work("F", 0, 0), Work("I", 0, 0), Work("F", 1, 0), Work("W", 0, 0),
                                       Work("B", 1, 0)))
    assert peak_activations(Schedule("own", 1, ((0,), (0,)), (slots,))) == [2]
    assert bubbles(Schedule("own", 1, ((0,), (0,)), (slots,)), UNIT) == [0]


def broken(change) -> Schedule:
    slots = [list(rank) for rank in make("1f1b", 2, 4).slots]
    change(slots)
    return make("1f1b", 2, 4)._replace(slots=tuple(map(tuple, slots)))


@pytest.mark.parametrize(("change", "message"), [
    (lambda slots: slots[0].pop(), "2 pieces of work are missing"),
    (lambda slots: slots[0].append(slots[0][0]), "a second time"),
    (lambda slots: slots[1].append(slots[0].pop()), "is for rank 0, not 1"),
    (lambda slots: slots[1].append((Work("F", 4, 1),)), "there are 4 micro-batches and 2 stages"),
    (lambda slots: slots[1].append((Work("F", 3, -1),)), "there are 4 micro-batches and 2 stages"),
    (lambda slots: slots[1].reverse(), "ranks wait for each other"),
    # A backward can't run with the forward that it is of.
    (lambda slots: slots[1].__setitem__(slice(0, 2), [slots[1][0] + slots[1][1]]), "ranks wait for each other")])
def test_what_cannot_run_is_found(change, message):
    with pytest.raises(ValueError, match=message):
        check(broken(change))


def test_kinds_of_a_slot_are_in_order():
    assert kinds_of((Work("F", 0, 0), Work("B", 1, 3))) == "FB"
