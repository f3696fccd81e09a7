"""Runs every script of this folder, and makes one page of them: tables, figures and claims of paper 1 beside ours.

  python experiments/paper/all.py --out runs/paper/index
  python experiments/paper/all.py --json

OUT.md and OUT.html, which needs no other file, have every table and figure; OUT.json the numbers.
"""

from __future__ import annotations

import base64
import html
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import tyro

from experiments.command_line import finish, provenance, say_line, standard_output_for_json, write_report
from experiments.paper import (
    contention,
    decode_limits,
    failures,
    local_deployment,
    memory_and_compute,
    network_flows,
    networks,
    offload,
    ordering,
    training_step,
)
from experiments.paper.report import Output, Section, as_markdown, draw_figures, shown

SCRIPTS = (memory_and_compute, local_deployment, decode_limits, training_step, networks, network_flows, contention,
           offload, ordering, failures)
"""In the order of the page; each has a function `section()`."""
TITLE = "Insights into DeepSeek-V3 (arXiv 2505.09343), as running experiments"


def main() -> None:
    """Entry point."""
    output = tyro.cli(Output, description=__doc__)
    jax.config.update("jax_platforms", "cpu")  # calculated: no accelerator is touched
    with standard_output_for_json(output.json) as write_json:
        sections = []
        for script in SCRIPTS:
            say_line(f"running {script.__name__}")
            sections.append(script.section())
        whole = [in_short(sections), *sections]
        page = page_in_markdown(whole)
        print(page, end="")
        items = [item.as_json() for section in sections for item in section.items]
        if output.out is not None:
            write_report(output.out, {"about": provenance(), "items": items}, page)
            for section in sections:
                draw_figures(section, output.out.parent)
            output.out.with_suffix(".html").write_text(page_in_html(whole, output.out.parent))
        write_json(items)
        print(f"{time.process_time():.0f} s of processor time", file=sys.stderr)


FAR = 0.15
"""Of the paper's number: lines further off are repeated at the top."""


def in_short(sections: Sequence[Section]) -> Section:
    """How to read the page, how many of the paper's numbers are met, and those that are not."""
    told = [(abs(item.ratio - 1), item) for section in sections for item in section.items if item.ratio is not None]
    near = {within: sum(off <= within for off, _ in told) for within in (0.01, 0.05, FAR)}
    met = ", ".join(f"{count} within {within:.0%}" for within, count in near.items())  # each has those before it
    text = ("Each section is a script of `experiments/paper`, made from calculation and simulation alone. *Paper* is "
            "what the paper prints, or the source that the line names; *ratio* is ours over that. A line without a "
            "number there is ours to add, or an input that something was calibrated on, as its note then says.\n\n"
            f"Of {len(told)} such numbers ours meet {met}.")
    far = tuple(item for off, item in told if off > FAR)
    return Section("In short", f"{text} The others are:" if far else text, far)


def page_in_markdown(sections: Iterable[Section]) -> str:
    """One page; figures lie beside it."""
    return f"# {TITLE}\n\n" + "\n".join(as_markdown(section, level=2) for section in sections)


def page_in_html(sections: Iterable[Section], folder: Path) -> str:
    """One file, with the figures that lie in `folder`."""
    body = "\n".join(section_in_html(section, folder) for section in sections)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(TITLE)}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(TITLE)}</h1>\n{body}\n</body>\n</html>\n")


_STYLE = ("body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
          "td,th{border-bottom:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}"
          ".number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}img{max-width:100%}")


def section_in_html(section: Section, folder: Path) -> str:
    """Heading, text, table and figures."""
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(
        ("what", "paper", "ours", "ratio", "note"), ("", *[' class="number"'] * 3, ""), strict=True))
    rows = [f"<tr><td>{_inline(item.item)}</td>"
            + "".join(f'<td class="number">{html.escape(text)}</td>' for text in shown(item))
            + f"<td>{_inline(item.note)}</td></tr>" for item in section.items]
    paragraphs = [f"<p>{_inline(text)}</p>" for text in section.text.split("\n\n")]
    figures = [f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,'
               f'{base64.b64encode((folder / f"{name}.png").read_bytes()).decode()}"></p>'
               for name, _ in section.figures]
    return "\n".join([f"<h2>{html.escape(section.title)}</h2>", *paragraphs, f"<table>\n<tr>{head}</tr>", *rows,
                      "</table>", *figures])


def _inline(text: str) -> str:
    """Markdown's code, emphasis and links, as far as sections use them."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\*([^* ][^*]*)\*", r"<i>\1</i>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s\"]+)\)", r'<a href="\2">\1</a>', text)


if __name__ == "__main__":
    finish(main)
