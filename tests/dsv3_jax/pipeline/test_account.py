"""Slots by kind, transfers, parameters and ticks of schedules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.account import (
    KINDS,
    UNIT,
    Durations,
    Transfer,
    moves,
    on_ticks,
    parameter_copies,
    slot_counts,
    stages_of,
)
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make

SIZES = {"name": st.sampled_from(list(SCHEDULES)), "ranks": st.integers(1, 8), "micro_batches": st.integers(1, 24)}


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_dualpipes_slots_add_up_over_the_eight_steps(ranks):
    """Sums over the steps of paper 2's schedule as DeepSeek published it."""
    micro_batches, half = 2 * ranks + 4, ranks // 2
    for rank, counts in enumerate(slot_counts(make("dualpipe", ranks, micro_batches))):
        h = min(rank, ranks - 1 - rank)
        pairs = 2 * (micro_batches // 2 - ranks + h + 1) + (half - h - 1) - (h == half - 1)
        put_off = 2 * (half - h - 1) + h + 1
        assert counts == {"F": micro_batches - pairs, "FB": pairs, "I": put_off, "W": put_off,
                          "B": micro_batches - pairs - put_off}


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_all_of_a_ranks_work_is_counted(name, ranks, micro_batches):
    schedule = make(name, *fitting_sizes(name, ranks, micro_batches))
    for rank, counts in enumerate(slot_counts(schedule)):
        assert tuple(counts) == KINDS
        assert counts["I"] == counts["W"]
        works = sum(schedule.routes[m][stage] == rank for m in range(schedule.micro_batches)
                    for stage in range(schedule.stages))
        assert counts["F"] + counts["FB"] == counts["B"] + counts["I"] + counts["FB"] == works
        assert works == schedule.micro_batches / schedule.share  # all ranks do as much


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_what_is_sent_is_received_once_and_later(name, ranks, micro_batches):
    """On ticks of lockstep too: a slot's transfers have a tick's end to travel in."""
    schedule = make(name, *fitting_sizes(name, ranks, micro_batches))
    ticks_of = [[] for _ in range(schedule.ranks)]
    for tick, rank in sorted(on_ticks(schedule)):
        ticks_of[rank].append(tick)
    sent, received = {}, {}
    for rank, row in enumerate(moves(schedule)):
        for tick, move in zip(ticks_of[rank], row, strict=True):
            for transfer in move.sends:
                assert (transfer.source, transfer not in sent) == (rank, True)
                sent[transfer] = tick
            for transfer in move.receives:
                assert (transfer.target, transfer not in received) == (rank, True)
                received[transfer] = tick
    assert sent.keys() == received.keys()
    assert all(received[transfer] > sent[transfer] for transfer in sent)
    crossings = sum(a != b for route in schedule.routes for a, b in itertools.pairwise(route))
    assert len(sent) == 2 * crossings


def test_a_v_turns_round_without_a_transfer():
    schedule = make("dualpipev", 2, 4)
    first, turn = moves(schedule)[0][0], moves(schedule)[1]
    assert first.receives == ()
    assert first.sends == (Transfer("output", 0, 0, 0, 1),)
    assert turn[0].receives == first.sends
    assert turn[0].sends == ()  # stage 1 and stage 2 are on rank 1
    assert turn[1].sends == (Transfer("output", 0, 2, 1, 0),)


def test_stages_and_copies():
    assert [stages_of(make("dualpipe", 4, 8), rank) for rank in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    assert [stages_of(make("dualpipev", 4, 8), rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [stages_of(make("interleaved", 4, 8, chunks=3), rank)[1] for rank in range(4)] == [4, 5, 6, 7]
    copies = {name: set(parameter_copies(make(name, *fitting_sizes(name, 8, 20)))) for name in SCHEDULES}
    assert copies == {name: {2.0 if name == "dualpipe" else 1.0} for name in SCHEDULES}


def test_slots_fill_the_ticks_that_they_take():
    schedule = make("1f1b", 2, 2)
    one = on_ticks(schedule)
    assert {cell: slot[0].kind + str(slot[0].micro_batch) for cell, slot in one.items()} == {
        (0, 0): "F0", (1, 0): "F1", (1, 1): "F0", (2, 1): "B0", (3, 0): "B0", (3, 1): "F1", (4, 1): "B1", (5, 0): "B1"}
    longer = on_ticks(schedule, UNIT)
    assert [tick for tick, rank in longer if rank == 1] == [1, 2, 3, 4, 5, 6]
    assert longer[2, 1] == longer[3, 1] == schedule.slots[1][1]


@pytest.mark.parametrize(("ticks", "message"), [
    (Durations(1.5, 1, 1, 3), "a slot F takes 1.5 ticks, and must take a whole number: take 2"),
    (Durations(1, 0.1, 0.1, 1), "a slot B takes 0.2 ticks, .*: take 1")])
def test_parts_of_ticks_are_refused(ticks, message):
    with pytest.raises(ConfigError, match=message):
        on_ticks(make("1f1b", 2, 2), ticks)


@pytest.mark.parametrize(("durations", "message"), [
    (Durations(0, 1, 1, 2), r"forward \(0\) must be positive"),
    (Durations(1, 1, float("nan"), 2), r"weight_backward \(nan\) must be positive"),
    (Durations(1, 1, 1, 1.5), r"pair \(1.5\) must be at least .* backward \(2\): take 2 or more")])
def test_durations_that_cannot_be_are_refused(durations, message):
    with pytest.raises(ConfigError, match=message):
        durations.checked()
    assert UNIT.checked().times(0.5) == Durations(0.5, 0.5, 0.5, 1)
