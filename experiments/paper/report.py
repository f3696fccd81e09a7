"""What the scripts of this folder share: a number of the paper beside ours, and the page that tells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.command_line import finish, provenance, standard_output_for_json, write_report


@dataclasses.dataclass(frozen=True)
class Item:
    """A number of the paper, and ours."""

    item: str
    """What, where it is printed, and its unit: "table 1, DeepSeek-V3, KB a token"."""
    paper: float | None
    """As printed; None for what the paper does not tell and we add."""
    ours: float
    note: str = ""
    """Where they differ: why. What it assumes, or was calibrated on."""

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's."""
        return self.ours / self.paper if self.paper else None

    def as_json(self) -> dict[str, Any]:
        """`item`, `paper`, `ours`, `ratio` and `note`."""
        return {"item": self.item, "paper": self.paper, "ours": self.ours, "ratio": self.ratio, "note": self.note}


@dataclasses.dataclass(frozen=True)
class Section:
    """One subject."""

    title: str
    text: str
    """What is computed, from which assumptions: Markdown, a paragraph or two."""
    items: tuple[Item, ...]
    figures: tuple[tuple[str, Callable[[], Any]], ...] = ()
    """(file name without ending, function that draws a matplotlib figure)."""


def as_markdown(section: Section, level: int = 1) -> str:
    """Heading, text, table and figures, which are looked for beside the page."""
    lines = [f"{'#' * level} {section.title}", "", section.text, "",
             "| what | paper | ours | ratio | note |", "|---|---:|---:|---:|---|"]
    lines += [f"| {' | '.join((item.item, *shown(item), item.note))} |" for item in section.items]
    for name, _ in section.figures:
        lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def shown(item: Item) -> tuple[str, str, str]:
    """Paper, ours and ratio as they are printed."""
    return _number(item.paper), _number(item.ours), "" if item.ratio is None else f"{item.ratio:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.6g}"


def draw_figures(section: Section, folder: Path) -> None:
    """Writes each figure as a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in section.figures:
        draw().savefig(folder / f"{name}.png", dpi=110)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every script here."""

    out: Path | None = None
    """Write OUT.json, OUT.md and, beside them, the figures."""
    json: bool = False
    """Print one JSON array of {item, paper, ours, ratio, note}."""


def run(section: Callable[..., Section], about: str, options: type[Output] = Output) -> None:
    """A script. One with options of its own has them in a dataclass beside those of `Output`, and `section` takes it.

    Pages are calculated: no accelerator is touched.
    """
    def main() -> None:
        output = tyro.cli(options, description=about)
        jax.config.update("jax_platforms", "cpu")
        with standard_output_for_json(output.json) as write_json:
            made = section() if options is Output else section(output)
            tell(made, output)
            write_json([item.as_json() for item in made.items])

    finish(main)


def tell(section: Section, output: Output) -> None:
    """Prints the section, and writes it if asked to."""
    text = as_markdown(section)
    print(text, end="")
    if output.out is not None:
        write_report(output.out, {"about": provenance(), "items": [item.as_json() for item in section.items]}, text)
        draw_figures(section, output.out.parent)
