"""Schedules as text."""

from __future__ import annotations

import pytest

from dsv3_jax.pipeline.account import Durations
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make
from dsv3_jax.pipeline.text import as_text


def test_a_small_one_is_as_drawn_by_hand():
    assert [line.rstrip() for line in as_text(make("1f1b", 2, 2)).splitlines()] == [
        "tick   0",
        "rank 0 F0F1    B0==  B1==",
        "rank 1   F0B0==F1B1=="]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 8])
def test_rows_are_equally_long_and_every_piece_is_written(name, ranks):
    schedule = make(name, *fitting_sizes(name, ranks, 20))
    text = as_text(schedule)
    ruler, *rows = text.splitlines()
    assert len({len(row) for row in (ruler, *rows)}) == 1
    assert [row.split()[1] for row in rows] == [str(rank) for rank in range(ranks)]
    for row, slots in zip(rows, schedule.slots, strict=True):
        cells = row[len("rank 0 "):].replace(" ", "").replace("=", "")
        assert [cells[at:at + 2] for at in range(0, len(cells), 2)] == [
            (work.kind if work.stage == schedule.slots.index(slots) else work.kind.lower())
            + "0123456789abcdefghijklmnopqrstuvwxyz"[work.micro_batch] for slot in slots for work in slot]


def test_the_papers_figure_fits_a_terminal():
    """Paper 2, figure 5: 8 ranks, 20 micro-batches."""
    assert max(map(len, as_text(make("dualpipe", 8, 20)).splitlines())) <= 120


def test_many_micro_batches_have_decimal_numbers():
    rows = as_text(make("1f1b", 2, 120)).splitlines()
    assert "F99 B99 ====F100B100====" in rows[2]
    assert "B119====" in rows[1]
    assert len({len(row) for row in rows}) == 1


def test_other_ticks_stretch_the_rows():
    rows = as_text(make("1f1b", 2, 2), Durations(2, 1, 1, 2)).splitlines()
    assert rows[1].rstrip() == "rank 0 F0==F1==    B0==    B1=="
