"""Compile what serves a model with replicated experts for pods that are not there, and report what came out.

  python experiments/compile_serving.py
  python experiments/compile_serving.py --deployment decode320 --rows 128 --context 8192
  python experiments/compile_serving.py --preset kimi_k2 --deployment decode144 --pod h200:18x8

Deployments: DeepSeek-V3's own, prefill on 32 GPUs and decode on 144 and on 320 (paper 2, section 3.4), and decode on
the rack of 72 that paper 1 calculates with (section 2.3.2). Of each the programs: for decode a step, a step with half
as many rows and a draft of each (so as many tokens), and the move of a layer's experts to another placement while
serving goes on; for prefill a chunk of prompts, and the move. Needs the extra `aot`, and a minute of one CPU core a
program.

It tells whether a program fits, how much of the exchanges with experts has products beside it, and what one device
sends to experts and back for a token in a layer: as compiled, of the rows alone (buffers have room for more than an
even load), and by paper 1's formula; and how fast a sequence would be decoded if nothing but the network took time, as
in the paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import tyro

from dsv3_jax.codesign.fitting import GIB
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.codesign.serving_aot import Program, compile_serving
from dsv3_jax.codesign.serving_network import as_compiled, limit, of_paper, of_rows
from dsv3_jax.config import ConfigError, ModelConfig, Precision, named
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.presets import DEPLOYMENTS, MODELS, ServingDeployment
from experiments.command_line import finish, provenance, standard_output_for_json, write_report

WAYS: dict[str, dict[str, Any]] = {"plain": {"transport": "padded", "dual": False},
                                   "overlapped": {"transport": "ragged", "dual": True}}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile, for what."""

    preset: str = "deepseek_v3"
    """Model."""
    deployment: tuple[str, ...] = ("all",)
    """prefill, decode144, decode320, decode72, or all."""
    pod: str | None = None
    """Other hardware of the same shape for all deployments, such as h200:18x8; default each one's own."""
    rows: int = 64
    """Sequences that decode on each device: two micro-batches of the paper's 32."""
    context: int = 4096
    """Tokens of each, at which the step is compiled."""
    page_size: int = 64
    chunk: int = 1024
    """Tokens of prompts that each device reads at a time; devices that share a prompt (four in prefill) read as many
    times that of it."""
    precision: Precision = "fp8"
    way: tuple[str, ...] = ("plain", "overlapped")
    """plain sends whole buffers (--mesh.transport padded), one exchange after another; overlapped the rows in them
    (ragged), and halves of a device's rows beside each other (--mesh.dual)."""
    acceptance: float = 0.85
    """Of a draft (80 to 90%: paper 1, section 2.3.3)."""
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    json: bool = False
    """Print the JSON to standard output, everything else to standard error."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_platforms", "cpu")  # compiled for the pod; nothing runs, and no accelerator is touched
    if arguments.rows < 4 or arguments.rows % 4:
        raise ConfigError(f"--rows ({arguments.rows}) must be divisible by 4: with drafts half of them are taken, and "
                          "in two halves")
    for way in arguments.way:
        named(WAYS, way, "--way")
    names = DEPLOYMENTS if "all" in arguments.deployment else arguments.deployment
    model = named(MODELS, arguments.preset, "--preset")
    chosen = {name: named(DEPLOYMENTS, name, "--deployment") for name in names}
    with standard_output_for_json(arguments.json) as write_json:
        results = [result for name, deployment in chosen.items()
                   for result in compiled(arguments, model, name, deployment)]
        told = {**provenance(), "model": arguments.preset, "rows": arguments.rows, "context": arguments.context,
                "chunk": arguments.chunk, "precision": arguments.precision, "acceptance": arguments.acceptance,
                "paper_bytes_per_token_and_layer": of_paper(model), "results": results}
        text = as_markdown(told)
        print(text)
        write_report(arguments.out, told, text)
        write_json(told)


def compiled(arguments: Arguments, model: ModelConfig, name: str, deployment: ServingDeployment) -> list[dict]:
    """The deployment's programs, a line of each told when it is there."""
    plain = dataclasses.replace(model, num_nextn_predict_layers=0)
    if name.startswith("prefill"):
        programs: list[tuple[Program, ModelConfig]] = [("chunk", model), ("move", model)]
    else:
        drafting: list[tuple[Program, ModelConfig]] = [("step", model)] if model != plain else []
        programs = [("step", plain), *drafting, ("move", model)]
    results = []
    for (program, taken), way in itertools.product(programs, arguments.way):
        if program == "move" and way != arguments.way[0]:
            continue  # no tokens travel
        result = {"deployment": name, "way": way, **measured(arguments, taken, deployment, program, way)}
        print(" ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in result.items() if isinstance(value, str | int | float)),
              file=sys.stderr, flush=True)
        results.append(result)
    return results


def measured(arguments: Arguments, model: ModelConfig, deployment: ServingDeployment,
             program: Program, way: str) -> dict[str, Any]:
    """One program's report, and what follows from it."""
    drafts = model.num_nextn_predict_layers
    rows = arguments.rows // (1 + drafts) if program == "step" else arguments.rows
    sizes = Sizes(rows, -(-arguments.context // arguments.page_size) * rows, arguments.page_size, arguments.context)
    pod = parse_pod(arguments.pod or deployment.pod)
    report = compile_serving(model, pod, deployment, program, sizes, chunk=arguments.chunk,
                             precision=arguments.precision, **WAYS[way])
    told: dict[str, Any] = {**dataclasses.asdict(report), "rows": rows, "drafts": drafts,
                            "collectives": [sent._asdict() for sent in report.collectives]}
    if program == "move":
        return told
    tokens_per_pass = sum(arguments.acceptance ** accepted for accepted in range(drafts + 1))
    rows_alone = of_rows(model, deployment, arguments.precision)
    for key, sent in (("compiled", as_compiled(report, rows_alone)), ("rows_alone", rows_alone)):
        told[key] = {"bytes_per_token_and_layer": sent._asdict(),
                     "limit": limit(sent, report, pod.hardware, tokens_per_pass)._asdict()}
    return told


def as_markdown(told: dict[str, Any]) -> str:
    """Tables for people."""
    lines = [f"# Serving {told['model']}, compiled ({told['precision']})", "", f"`{told['command']}`", "",
             f"{told['device']}, which compiled and ran nothing; jax {told['jax']}, Python {told['python']}, "
             f"{told['date']}. A step of {told['rows']} tokens a device at a context of {told['context']:,}; a chunk "
             f"of {told['chunk']:,}. Memory of one device; `move` is that of one layer's experts to another placement.",
             "",
             "| deployment | pod | program | rows, drafts | | GiB | of | GB of buffers sent, between nodes | beside "
             "products: between nodes | inside | compiled in |", "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in told["results"]:
        sent, slow = (sum(each[key] for each in row["collectives"]) / 1e9 for key in ("bytes", "slow_bytes"))
        way = "" if row["program"] == "move" else row["way"]
        lines.append(f"| {row['deployment']} | {row['pod']} | {row['program']} | {_rows(row)} | {way} | "
                     f"{row['peak_bytes'] / GIB:.1f} | {row['hbm_bytes'] / GIB:.1f} | {sent:.3f}, {slow:.3f} | "
                     f"{_beside(row, between=True)} | {_beside(row, between=False)} | {row['compile_seconds']:.0f} s |")
    lines += ["", "To experts and back, bytes of one token in one layer over the network between nodes and the one "
              "inside, and the time of a pass at nominal bandwidths if nothing else took any. Paper 1's formula "
              f"(section 2.3.2) has {told['paper_bytes_per_token_and_layer']:,.0f} bytes, all over one network. With "
              f"drafts, tokens/s are at {told['acceptance']:.0%} accepted. Plain buffers are sent whole.", "",
              "| deployment | program | rows, drafts | | KB between | KB inside | ms between | ms inside | tokens/s |",
              "|---|---|---|---|---:|---:|---:|---:|---:|"]
    for row in told["results"]:
        for key, name in (("compiled", row["way"]), ("rows_alone", "rows alone")):
            if key in row and (key == "compiled" or row["way"] == told["results"][0]["way"]):
                sent, least = row[key]["bytes_per_token_and_layer"], row[key]["limit"]
                rate = f"{least['tokens_per_second']:,.1f}" if row["program"] == "step" else ""
                lines.append(f"| {row['deployment']} | {row['program']} | {_rows(row)} | {name} | "
                             f"{sent['slow'] / 1e3:.1f} | {sent['fast'] / 1e3:.1f} | {1e3 * least['slow']:.2f} | "
                             f"{1e3 * least['fast']:.2f} | {rate} |")
    return "\n".join(lines) + "\n"


def _beside(row: dict[str, Any], between: bool) -> str:
    """Share of the bytes to experts and back that have products between start and done, over one of the networks."""
    exchanges = [each for each in row["collectives"] if each["kind"].endswith("all-to-all")
                 and bool(each["slow_bytes"]) is between]
    if row["program"] == "move" or not exchanges:
        return ""
    return f"{sum(e['overlapped_bytes'] for e in exchanges) / sum(e['bytes'] for e in exchanges):.1%}"


def _rows(row: dict[str, Any]) -> str:
    return f"{row['rows']}, {row['drafts']}" if row["program"] == "step" else ""


if __name__ == "__main__":
    finish(main)
