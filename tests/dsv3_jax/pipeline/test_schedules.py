"""Schedules against the papers' counts: bubbles, activations, DualPipe's steps; and schedules that can't be."""

from __future__ import annotations

import itertools

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.schedule import Schedule, Slot, Work, kinds_of, peak_activations, run
from dsv3_jax.pipeline.schedules import SCHEDULES, make

RANKS, MICRO_BATCHES = (2, 4, 8), 20
SECONDS = {"F": 1.0, "I": 1.0, "W": 0.8, "B": 1.8, "FB": 2.24}
F, W, B, FB = (SECONDS[kind] for kind in ("F", "W", "B", "FB"))


def seconds(rank: int, slot: Slot) -> float:
    return SECONDS[kinds_of(slot)]


@pytest.mark.parametrize("ranks", [*RANKS, 16])
@pytest.mark.parametrize(("name", "bubble", "activations"), [
    ("gpipe", lambda p: (p - 1) * (F + B), lambda p, n: n),
    ("1f1b", lambda p: (p - 1) * (F + B), lambda p, n: p),
    ("zb1p", lambda p: (p - 1) * (F + B - 2 * W), lambda p, n: p),
    ("dualpipe", lambda p: (p / 2 - 1) * (FB + B - 3 * W), lambda p, n: p + 1)])
def test_bubbles_and_activations_are_the_papers(name, bubble, activations, ranks):
    """Paper 2, table 2. Its formula for DualPipe holds where a forward takes as long as a backward's part for inputs,
    and of the two ranks in the middle: the others have fewer pairs, and wait less."""
    micro_batches = max(MICRO_BATCHES, 2 * ranks)
    schedule = make(name, ranks, micro_batches)
    timeline = run(schedule, seconds)
    assert timeline.bubble(ranks // 2) == pytest.approx(bubble(ranks))
    if name != "dualpipe":
        assert timeline.bubble(0) == pytest.approx(bubble(ranks))
    assert max(peak_activations(schedule, timeline)) == activations(ranks, micro_batches)


def test_pairs_that_cover_each_other_shorten_the_step():
    whole = make("dualpipe", 8, 20)
    apart = run(whole, lambda rank, slot: sum(SECONDS[work.kind] for work in slot)).seconds
    assert run(whole, seconds).seconds < apart - 10 * (F + B - FB)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (8, 20), (16, 40)])
def test_dualpipes_steps_are_those_published(ranks, micro_batches):
    """Counts of the eight steps by rank (facts of DeepSeek's DualPipe), with H half of the ranks and h the distance to
    the nearer end."""
    schedule, half = make("dualpipe", ranks, micro_batches), ranks // 2
    for rank, slots in enumerate(schedule.slots):
        h = min(rank, ranks - 1 - rank)
        kinds = [kinds_of(slot) for slot in slots]
        assert list(itertools.takewhile(lambda kind: kind == "F", kinds)) == ["F"] * (
            2 * (half - h - 1) + 2 * (h + 1) + (h == half - 1))
        pairs = 2 * (micro_batches // 2 - ranks + h + 1) + (half - h - 1) - (h == half - 1)
        assert kinds.count("FB") == pairs
        assert kinds.count("I") == kinds.count("W") == 2 * (half - h - 1) + (h + 1)
        assert kinds[-(h + 1):] == ["W"] * (h + 1)
        sides = {work.micro_batch // (micro_batches // 2) for slot in slots[:2 * (half - h - 1)] for work in slot}
        assert sides <= {int(rank >= half)}  # the first come in at the near end


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_transfer_costs_its_time(name, ranks):
    """A step gets longer by the transfers on its longest path, which has one between each two stages at least."""
    schedule = make(name, ranks, MICRO_BATCHES)
    plain, slower = (run(schedule, seconds, transfer).seconds for transfer in (0.0, 0.1))
    assert slower >= plain + 0.1 * (ranks - 1)


def broken(change) -> Schedule:
    slots = [list(rank) for rank in make("1f1b", 2, 4).slots]
    change(slots)
    return make("1f1b", 2, 4)._replace(slots=tuple(map(tuple, slots)))


@pytest.mark.parametrize(("change", "message"), [
    (lambda slots: slots[0].pop(), "2 pieces of work are missing"),
    (lambda slots: slots[0].append(slots[0][0]), "a second time"),
    (lambda slots: slots[1].append(slots[0].pop()), "is for rank 0, not 1"),
    (lambda slots: slots[1].reverse(), "ranks wait for each other")])
def test_what_cannot_run_is_found(change, message):
    with pytest.raises(ValueError, match=message):
        run(broken(change), seconds)


@pytest.mark.parametrize(("name", "ranks", "micro_batches", "message"), [
    ("dualpipe", 3, 20, r"ranks \(3\) must be even: take 4"),
    ("dualpipe", 8, 14, r"micro-batches \(14\) must be even and at least twice the ranks: take 16"),
    ("dualpipe", 4, 9, "take 10"),
    ("1f1b", 8, 4, r"micro-batches \(4\) must be at least the ranks \(8\)"),
    ("zb1p", 8, 4, r"micro-batches \(4\) must be at least the ranks \(8\)"),
    ("gpipe", 0, 4, "at least 1"),
    ("dualtube", 2, 4, "dualtube")])
def test_sizes_that_cannot_be_are_refused(name, ranks, micro_batches, message):
    with pytest.raises(ConfigError, match=message):
        make(name, ranks, micro_batches)


def test_a_slot_holds_what_covers_each_other():
    pairs = [slot for rank in make("dualpipe", 4, 8).slots for slot in rank if len(slot) > 1]
    assert all(len({work.micro_batch // 4 for work in slot}) == 2 for slot in pairs)  # from either end
    assert Work("F", 0, 0) in make("dualpipe", 4, 8).slots[0][0]
