"""Orders of work: DualPipe's published steps, DualPipeV as its half, Megatron's interleaving; sizes that can't be."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError, PipelineSchedule
from dsv3_jax.pipeline.account import UNIT
from dsv3_jax.pipeline.schedule import Work, kinds_of, peak_activations, run
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, interleaved, make

PAIRED = ("dualpipe", "dualpipev")


def test_settings_name_the_schedules_that_there_are():
    assert get_args(PipelineSchedule) == tuple(SCHEDULES)


@pytest.mark.parametrize(("name", "ranks", "micro_batches"), [
    ("dualpipe", 2, 4), ("dualpipe", 4, 8), ("dualpipe", 8, 20), ("dualpipe", 16, 40), ("dualpipev", 1, 2),
    ("dualpipev", 4, 8), ("dualpipev", 8, 20)])
def test_steps_are_the_eight_published(name, ranks, micro_batches):
    """Of DeepSeek's DualPipe, written out slot by slot: kind and side, 0 the side that enters at the near end. Ranks in
    the middle don't overlap the first pair."""
    schedule = make(name, ranks, micro_batches)
    depth, each = (ranks // 2, micro_batches // 2) if name == "dualpipe" else (ranks, micro_batches)
    for rank, slots in enumerate(schedule.slots):
        h = min(rank, ranks - 1 - rank) if name == "dualpipe" else rank
        last_half = [("B" if i <= h else "I") + str(1 - i % 2) for i in range(2 * (h + 1))]
        steps = [["F0"] * (2 * (depth - h - 1)), ["F0", "F1"] * (h + 1), ["I1", "W", "F1"] * (depth - h - 1),
                 ["F0B1", "F1B0"] * (each - 2 * depth + h + 1), ["B1", "F1B0"] * (depth - h - 1), last_half,
                 ["W", "I0"] * (depth - h - 1), ["W"] * (h + 1)]
        expected = [slot for step in steps for slot in step]
        if h == depth - 1:
            expected[2 * depth:2 * depth + 1] = ["F0", "B1"]

        def side(work: Work, rank: int = rank) -> str:
            if work.kind == "W":
                return ""
            if name == "dualpipev":
                return "01"[work.stage != rank]
            return "01"[(work.micro_batch < each) != (rank < depth)]

        assert ["".join(work.kind + side(work) for work in slot) for slot in slots] == expected


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_weights_parts_come_in_the_order_of_inputs_parts(name, ranks):
    """So that what is kept between them is a queue; and no rank takes up a later micro-batch before an earlier one of
    the same way through the stages."""
    schedule = make(name, *fitting_sizes(name, ranks, 20))
    for slots in schedule.slots:
        works = [work for slot in slots for work in slot]
        put_off = [work for work in works if work.kind == "W"]
        assert put_off == [work._replace(kind="W") for work in works if work.kind == "I"]
        for (_, _), of_stage in itertools.groupby(sorted(works, key=lambda w: (w.kind == "F", w.stage)),
                                                  lambda w: (w.kind == "F", w.stage)):
            by_route: dict[tuple[int, ...], list[int]] = {}
            for work in of_stage:
                if work.kind != "W":
                    by_route.setdefault(schedule.routes[work.micro_batch], []).append(work.micro_batch)
            assert all(numbers == sorted(numbers) for numbers in by_route.values())


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 6), more=st.integers(0, 6))
def test_dualpipev_is_the_first_half_of_dualpipe(ranks, more):
    """Of twice the ranks, which takes as many micro-batches from either end: same slots at the same times."""
    cut = make("dualpipev", ranks, 2 * ranks + more)
    whole = make("dualpipe", 2 * ranks, 2 * (2 * ranks + more))
    half = whole.micro_batches // 2
    for row, theirs in zip(run(cut, UNIT).ranks, run(whole, UNIT).ranks[:ranks], strict=True):
        assert [(timed.start, timed.end) for timed in row] == [(timed.start, timed.end) for timed in theirs]
        for mine, other in zip(row, theirs, strict=True):
            for work, original in zip(mine.slot, other.slot, strict=True):
                assert work.kind == original.kind
                assert work.micro_batch == original.micro_batch % half
                # What came in at the other end counts its stages on from the turn.
                assert work.stage == original.stage


def test_interleaved_goes_through_chunks_in_groups_of_the_ranks():
    """Rank 0 of 2, 4 micro-batches, written out from arXiv 2104.04473's description."""
    slots = ["".join(f"{work.kind}{work.micro_batch}.{work.stage}" for work in slot)
             for slot in make("interleaved", 2, 4).slots[0]]
    assert " ".join(slots) == ("F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0 B1.2 F2.2 B0.0 F3.2 B1.0 B2.2 B3.2 B2.0 B3.0")
    for chunks in (2, 3, 5):
        deep = interleaved(4, 8, chunks)
        assert deep.stages == 4 * chunks
        assert max(peak_activations(deep)) == min(4 * chunks + 3, 8 * chunks)
        assert {work.stage % 4 for slot in deep.slots[3] for work in slot} == {3}


def test_pairs_are_of_different_ways_through_the_stages():
    for name in PAIRED:
        pairs = [slot for rank in make(name, 4, 8).slots for slot in rank if len(slot) > 1]
        assert {kinds_of(slot) for slot in pairs} == {"FB"}
        assert all(forward.stage != backward.stage for forward, backward in pairs)


@pytest.mark.parametrize(("name", "ranks", "micro_batches", "message"), [
    ("dualpipe", 5, 20, r"ranks \(5\) must be even: take 6"),
    ("dualpipe", 0, 20, r"ranks \(0\) must be at least 2: take 2"),
    ("dualpipe", 8, 14, r"micro-batches \(14\) must be even and at least twice the ranks \(8\): take 16"),
    ("dualpipe", 4, 9, "take 10"),
    ("dualpipev", 8, 14, r"micro-batches \(14\) must be at least twice the ranks \(8\): take 16"),
    ("interleaved", 8, 20, r"micro-batches \(20\) must be a positive multiple of the ranks \(8\): take 24"),
    ("1f1b", 8, 4, r"micro-batches \(4\) must be at least the ranks \(8\): take 8"),
    ("zb1p", 8, 4, r"micro-batches \(4\) must be at least the ranks \(8\): take 8"),
    ("gpipe", 0, 4, r"ranks \(0\) must be at least 1: take 1"),
    ("gpipe", 4, 0, r"micro-batches \(0\) must be at least 1: take 1"),
    ("dualtube", 2, 4, "dualtube")])
def test_sizes_that_cannot_be_are_refused(name, ranks, micro_batches, message):
    with pytest.raises(ConfigError, match=message):
        make(name, ranks, micro_batches)


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "interleaved", "chunks": 1}, r"chunks \(1\) must be at least 2: take 2, or the schedule 1f1b"),
    ({"name": "1f1b", "chunks": 2}, r"chunks \(2\) are for interleaved alone"),
    ({"name": "gpipe", "most_activations": 4}, r"rank 0 keeps 8 stage inputs .* most_activations \(4\): allow 8"),
    ({"name": "dualpipe", "most_activations": 4}, "keeps 5 .* allow 5")])
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options, ranks=4, micro_batches=8)
    assert make("1f1b", 4, 8, most_activations=4).name == "1f1b"


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SCHEDULES)), ranks=st.integers(-1, 9), micro_batches=st.integers(-1, 24))
def test_sizes_are_taken_or_the_nearest_is_named(name, ranks, micro_batches):
    fitting = fitting_sizes(name, ranks, micro_batches)
    made = make(name, *fitting)  # checked: all work once, nobody waits for ever
    assert (made.ranks, made.micro_batches) == fitting
    assert fitting >= (ranks, micro_batches)
    if fitting != (ranks, micro_batches):
        wrong, right = (ranks, fitting[0]) if fitting[0] != ranks else (micro_batches, fitting[1])
        with pytest.raises(ConfigError, match=rf"\({wrong}\) must be .*: take {right}$"):
            make(name, ranks, micro_batches)
