"""The pages of the paper's numbers: printed digits, options, and one page of all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from experiments.command_line import import_pyplot
from experiments.paper import all as all_scripts
from experiments.paper import decode_limits, local_deployment, memory_and_compute
from experiments.paper.report import Item, Section


def by_name(section: Section) -> dict[str, Item]:
    assert len({item.item for item in section.items}) == len(section.items)
    return {item.item: item for item in section.items}


@pytest.fixture(scope="module")
def memory() -> Section:
    return memory_and_compute.section()


def test_tables_1_and_2(memory):
    """To the printed digits, or with the reason."""
    items = by_name(memory)
    for model in ("DeepSeek-V3 (MLA)", "Qwen-2.5 72B (GQA)", "LLaMA-3.1 405B (GQA)"):
        assert items[f"table 1, {model}, KB a token"].ratio == 1
    assert round(items["table 1, Qwen-2.5 72B over DeepSeek-V3"].ours, 2) == 4.66
    assert round(items["table 1, LLaMA-3.1 405B over DeepSeek-V3"].ours, 2) == 7.34
    for model, digits in (("V2", 155), ("V3", 250)):
        assert round(items[f"table 2, DeepSeek-{model}, GFLOP a token"].ours) == digits
    assert "it is 2447.9" in items["table 2, LLaMA-405B, GFLOP a token"].note
    assert items["table 2, Qwen-72B, GFLOP a token"].ratio > 1.1
    assert "and 394.0 without projections" in items["table 2, Qwen-72B, GFLOP a token"].note
    assert all(item.note for item in memory.items if item.ratio and abs(item.ratio - 1) > 0.005)


def test_copies_between_nodes(memory):
    """8 t without sharing copies, M t with: at most 4."""
    copies = [item for item in memory.items if item.item.startswith("section 4.3") and item.paper]
    assert [(item.paper, item.ours) for item in copies] == [(8, 8), (4, 4)]


def test_layouts_stand_beside_what_was_compiled(memory):
    items = by_name(memory)
    for preset in ("h800", "h800_fp8"):
        for what in ("all-to-all between nodes, GB a device and step", "all-to-all inside nodes, GB a device and step",
                     "state, GB a device", "GFLOP a token"):
            assert items[f"deepseek_v3_{preset}, {what}"].note.endswith("1.000 times")


def test_a_layout_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nbased_on = "h800"\nlargest_scale_up = 64\n')
    options = memory_and_compute.Options("deepseek_v3", "mine:8x64", tmp_path / "mine.toml", context=2048,
                                         recompute="full", micro_batches=60)
    name, predicted = memory_and_compute.own_layout(options)
    assert name == "deepseek_v3 on mine:8x64"
    assert predicted.pod.devices == 512
    assert predicted.traffic.between_nodes > 0
    for wrong, message in ((memory_and_compute.Options(context=1), "--preset is missing"),
                           (memory_and_compute.Options("tiny"), "--preset tiny has no pod of its own")):
        with pytest.raises(ConfigError, match=message):
            memory_and_compute.own_layout(wrong)


def test_decode_limits():
    items = by_name(decode_limits.section())
    printed = [(item.paper, item.ours) for item in items.values()
               if item.item.startswith("section 2.3.2") and item.paper]
    assert [paper for paper, _ in printed] == [120.96, 241.92, 14.76, 67, 6.72, 0.82, 1200]
    # Times are rounded, rates cut off.
    assert all(round(ours, 2) == paper or int(ours) == paper or paper == 1200 for paper, ours in printed)
    own = by_name(decode_limits.section(decode_limits.Options("deepseek_v2", "gb200", "nvlink5", 32768, 64, 72)))
    assert own["deepseek_v2 on gb200, with computing at the least, tokens/s"].ours < 200
    assert "deepseek_v2 on gb200, with a draft accepted at 85%, tokens/s" not in own


def test_local_deployment():
    section = local_deployment.section(local_deployment.Options("kimi_k2", "ktransformers_server", "q4_0"))
    told = [(item.paper, item.ours) for item in section.items if item.paper]
    # Bounds: not below the paper's, and on PCs at most a sixth above.
    assert all(ours >= paper for paper, ours in told)
    assert all(ours < 1.16 * paper for paper, ours in told[:3])
    assert section.items[-1].item.startswith("kimi_k2 on 2x 8 channels")
    assert len(local_deployment.section().items) == len(section.items) - 1
    with pytest.raises(ConfigError, match="--bits q9 is unknown"):
        local_deployment.section(local_deployment.Options(machine="m4_max", bits="q9"))


class Script:
    """Stands for a module of the folder."""

    @staticmethod
    def section() -> Section:
        return Section("Tables & claims", "Of `code`.\n\nAnd **more** < that.",
                       (Item("table 0, x", 2.0, 3.0, "a < b"), Item("y", None, 12345.0)),
                       (("drawn", lambda: import_pyplot().figure(figsize=(1, 1))),))


def test_one_page_of_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_scripts, "SCRIPTS", (Script, Script))
    monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path / "page")])
    all_scripts.main()
    text = capsys.readouterr().out
    assert text.count("\n## Tables & claims\n") == 2
    assert "| table 0, x | 2 | 3 | 1.500 | a < b |" in text
    assert (tmp_path / "page.md").read_text() in text
    assert json.loads((tmp_path / "page.json").read_text())["items"][0] == {
        "item": "table 0, x", "paper": 2.0, "ours": 3.0, "ratio": 1.5, "note": "a < b"}
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    assert "Of 2 such numbers ours meet 0 within 1%, 0 within 5%, 0 within 15%. The others are:" in page
    assert page.count("<td>table 0, x</td>") == 4  # once a section, and both at the top
    assert "<i>ratio</i>" in page
    assert page.count("<h2>Tables &amp; claims</h2>") == page.count('src="data:image/png;base64,iVBOR') == 2
    assert "<p>Of <code>code</code>.</p>" in page
    assert "<p>And <b>more</b> &lt; that.</p>" in page
    assert '<td>y</td><td class="number"></td><td class="number">12,345</td>' in page
    assert "src=\"drawn" not in page


def test_all_as_json(monkeypatch, capfd):
    monkeypatch.setattr(all_scripts, "SCRIPTS", (Script,))
    monkeypatch.setattr(sys, "argv", ["all.py", "--json"])
    with open(1, "w", closefd=False) as real:  # as in a process of its own
        monkeypatch.setattr(sys, "stdout", real)
        all_scripts.main()
    told = capfd.readouterr()
    assert [item["item"] for item in json.loads(told.out)] == ["table 0, x", "y"]
    assert "# Insights" in told.err


def test_every_script_is_on_the_page():
    """A script of the folder that is not listed would be forgotten."""
    folder = Path(all_scripts.__file__).parent
    with_section = {path.stem for path in folder.glob("*.py") if "\ndef section(" in path.read_text()}
    assert with_section == {script.__name__.rsplit(".", 1)[1] for script in all_scripts.SCRIPTS}
