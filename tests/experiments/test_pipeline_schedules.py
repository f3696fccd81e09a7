"""The table of schedules, its sizes and durations, and its output in text, JSON and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.account import UNIT, Durations
from dsv3_jax.pipeline.schedules import SCHEDULES, make
from experiments import pipeline_picture, pipeline_schedules
from experiments.pipeline_schedules import (
    FIGURE_5,
    TABLE_4,
    TRAINING,
    Arguments,
    durations_of,
    main,
    row_of,
    sizes_of,
    table_4_durations,
    table_4_rows,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--ranks", "2", "--micro-batches", "4"]


def called(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline_schedules.py", *arguments])
    main()


@pytest.mark.parametrize(("rank", "alone"), [(0, 23), (7, 17), (8, 17), (None, 19.625)])
def test_table_4_is_cut_into_slots(rank, alone):
    """Forwards outside pairs, from the eight steps at 16 ranks: 16 + (7 - h), and one more in the middle, whose first
    pair is apart; 120 forwards in all. The totals come out again."""
    d = table_4_durations(rank)
    assert d.forward * alone == pytest.approx(1.13)
    assert d.input_backward * alone == pytest.approx(1.99)
    assert d.weight_backward * alone == pytest.approx(0.48)
    assert d.pair * (120 - alone) == pytest.approx(13.95)
    assert TABLE_4["step"] == pytest.approx(sum(TABLE_4[part] for part in ("1F", "1B", "1W", "1F1B", "bubble", "opt")),
                                            abs=0.03)


def test_all_readings_of_table_4_wait_less_than_it_does():
    """What the report says; and by construction a rank works as long as its reading has it: parts and waits make the
    step."""
    rows = table_4_rows()
    assert [row["reading"] for row in rows] == ["mean of ranks", "first rank", "middle rank"]
    for row in rows:
        assert 0.9 < row["bubble_least"] < row["bubble_most"] < row["paper_bubble"]
        assert 0 < row["covered"] < 0.5
    work = sum(TABLE_4[part] for part in ("1F", "1B", "1W", "1F1B", "opt"))
    assert rows[1]["step"] - rows[1]["bubble_least"] == pytest.approx(work)
    assert rows[2]["step"] - rows[2]["bubble_most"] == pytest.approx(work)


def test_rows_have_the_stages_share_of_a_rank():
    """8 ranks, 20 micro-batches, F = I = 1, W = 0.5, F&B = 2 for an eighth of the model."""
    share = Durations(1, 1, 0.5, 2)
    rows = {name: row_of(make(name, 8, 20 if name != "interleaved" else 24), share) for name in SCHEDULES}
    assert {name: row["bubble_most"] for name, row in rows.items()} == {
        "gpipe": 17.5, "1f1b": 17.5, "interleaved": 8.75, "zb1p": 10.5, "dualpipe": 6, "dualpipev": 7}
    assert {name: row["activations_in_shares"] for name, row in rows.items()} == {
        "gpipe": 20, "1f1b": 8, "interleaved": 11.5, "zb1p": 8, "dualpipe": 9, "dualpipev": 8.5}
    assert all(row["table_over_formula"] == 1 for row in rows.values())
    assert all(row["peak_activations"] == row["formula_activations"] for row in rows.values())
    assert rows["1f1b"]["step"] == 20 * 2.5 + 17.5
    assert rows["1f1b"]["bubble_share"] == 17.5 / 67.5


def test_sizes_are_the_papers_unless_told():
    assert sizes_of(Arguments()) == [FIGURE_5, TRAINING] == [(8, 20), (16, 120)]
    assert sizes_of(Arguments(ranks=4)) == [(4, 20)]
    assert sizes_of(Arguments(ranks=16)) == [(16, 32)]
    assert sizes_of(Arguments(micro_batches=40)) == [(8, 40)]


def test_durations_are_all_or_none():
    assert durations_of(Arguments()) == table_4_durations()
    assert durations_of(Arguments(forward=1, input_backward=1, weight_backward=1, pair=2)) == UNIT
    with pytest.raises(ConfigError, match="given without --weight-backward, --pair: give all four, or none"):
        durations_of(Arguments(forward=1, input_backward=1))
    with pytest.raises(ConfigError, match=r"pair \(1\) must be at least"):
        durations_of(Arguments(forward=1, input_backward=1, weight_backward=1, pair=1))


def test_json_is_all_there_is_on_standard_output():
    """In a process of its own, as what JAX prints counts too."""
    done = subprocess.run([sys.executable, pipeline_schedules.__file__, *SMALL, "--schedule", "1f1b", "dualpipe",
                           "--text", "--json"], capture_output=True, text=True, check=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    out, err = done.stdout, done.stderr
    told = json.loads(out)
    assert [(row["schedule"], row["ranks"], row["micro_batches"]) for row in told["rows"]] == [
        ("1f1b", 2, 4), ("dualpipe", 2, 4)]
    assert [row["reading"] for row in told["table_4"]] == ["mean of ranks", "first rank", "middle rank"]
    assert "rank 1   F0B0==" in err
    assert "| DualPipe | 2 | 4 |" in err


def test_one_that_does_not_fit_is_refused_alone_and_enlarged_among_others(monkeypatch, capfd):
    with pytest.raises(ConfigError, match=r"ranks \(3\) must be even: take 4"):
        called(monkeypatch, "--ranks", "3", "--micro-batches", "7", "--schedule", "dualpipe")
    called(monkeypatch, "--ranks", "3", "--micro-batches", "7", "--chunks", "3")
    out = capfd.readouterr().out
    for row in ("GPipe | 3 | 7", "1F1B | 3 | 7", "Interleaved 1F1B | 3 | 9", "DualPipe | 4 | 8", "DualPipeV | 3 | 7"):
        assert f"| {row} |" in out
    with pytest.raises(ConfigError, match="schedule 2f2b is unknown"):
        called(monkeypatch, "--schedule", "2f2b")


def test_pictures_show_every_slot(monkeypatch, tmp_path, capfd):
    called(monkeypatch, *SMALL, "--schedule", "dualpipe", "--out", str(tmp_path / "s"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.md", "s.png", "s_dualpipe.png"]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "s.json").read_text())["rows"][0]["slots_per_rank"]
    assert (tmp_path / "s.md").read_text() == capfd.readouterr().out
    schedule = make("dualpipe", 2, 4)
    figure = pipeline_picture.draw([pipeline_picture.Panel("title", "remark", schedule, UNIT)], "time")
    axis = figure.axes[0]
    works = [work for slots in schedule.slots for slot in slots for work in slot]
    pairs = sum(len(slot) == 2 for slots in schedule.slots for slot in slots)
    assert len(axis.collections[0].get_paths()) == schedule.ranks + len(works) + pairs
    assert sorted(text.get_text() for text in axis.texts) == sorted(str(work.micro_batch) for work in works)
    bare = pipeline_picture.draw([pipeline_picture.Panel("title", "remark", schedule, UNIT)], "time", numbers=False)
    assert not bare.axes[0].texts
