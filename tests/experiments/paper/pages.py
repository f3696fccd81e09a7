"""What every page of experiments/paper must be."""

from __future__ import annotations

import math
from pathlib import Path

from experiments.paper.report import Item, Section, as_markdown, draw_figures


def checked(section: Section, folder: Path) -> dict[str, Item]:
    """The items by name; no name twice, every number finite, and every figure drawn into `folder`."""
    items = {item.item: item for item in section.items}
    assert len(items) == len(section.items)
    assert all(math.isfinite(item.ours) for item in section.items)
    page = as_markdown(section)
    draw_figures(section, folder)
    for name, _ in section.figures:
        assert f"({name}.png)" in page
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return items
