"""What a token costs in the cache with each way to shrink it that paper 1 names (section 2.1.2), and in quality.

  python experiments/kv_cache.py
  python experiments/kv_cache.py --quality runs/quickstart --quality runs/quickstart_gqa --windows 16 32 64 --out OUT

Bytes are those of caches allocated here, beside paper 1's table 1. With --quality, trained runs read their held-out
text through each format and each window, as they are: formats and windows need no training, GQA and MQA do
(train.py --preset quickstart_gqa, or --model.attention gqa). Of Qwen-2.5 72B and LLaMA-3.1 405B only what a cache
depends on is taken: layers, heads of keys and values, and their width.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, run_from_dict
from dsv3_jax.inference.cache import CacheFormat, LatentCache, entry_layout
from dsv3_jax.inference.entry_format import EntryLayout
from dsv3_jax.presets import MODELS
from dsv3_jax.training.evaluate_cached import CacheChoice, cached_quality
from dsv3_jax.training.tokens import prepare
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report
from experiments.inference_options import FolderOptions, load_for_inference

V3 = MODELS["deepseek_v3"]
TEXT, WINDOW = 512, 64
"""Tokens of a row, and a window, for the line that has one."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compare."""

    quality: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A run folder of experiments/train.py, given once for each."""
    windows: tuple[int, ...] = (16, 32, 64)
    """Windows to read them with."""
    step: int | None = None
    """Checkpoint to use; default the latest."""
    out: Path | None = None
    """Write OUT.json, OUT.md and, with --quality, OUT.png."""
    json: bool = False
    """Print one JSON object."""


def grouped(layers: int, kv_heads: int, model: ModelConfig = V3) -> ModelConfig:
    """A model whose cache holds `kv_heads` heads of 128 of keys and as many of values."""
    return dataclasses.replace(model, num_hidden_layers=layers, attention="gqa", num_key_value_heads=kv_heads,
                               head_dim=128)


class Choice(NamedTuple):
    """A line of the first table."""

    name: str
    model: ModelConfig
    cache: CacheFormat = "bf16"
    paper_kb: float | None = None
    """KB a token, as paper 1's table 1 prints it."""
    paper_multiple: float | None = None


def choices() -> list[Choice]:
    """All lines; the others are compared with the first."""
    eight_heads, windowed = grouped(61, 8), dataclasses.replace(V3, attention_window=WINDOW)
    return [Choice("DeepSeek-V3, MLA", V3, "bf16", 70.272, 1.0), Choice("DeepSeek-V3, MLA", V3, "float8"),
            Choice("DeepSeek-V3, MLA", V3, "int8"), Choice(f"DeepSeek-V3, MLA, window {WINDOW} of {TEXT}", windowed),
            Choice("DeepSeek-V3 with MQA", grouped(61, 1)), Choice("DeepSeek-V3 with GQA, 8 heads", eight_heads),
            Choice("DeepSeek-V3 with GQA, 8 heads", eight_heads, "float8"),
            Choice("DeepSeek-V3 with all 128 heads", grouped(61, 128)),
            Choice("Qwen-2.5 72B, GQA", grouped(80, 8), "bf16", 327.680, 4.66),
            Choice("LLaMA-3.1 405B, GQA", grouped(126, 8), "bf16", 516.096, 7.28)]


def allocated_bytes_per_token(config: ModelConfig, kind: CacheFormat) -> float:
    """Bytes of a cache allocated here, of the main model's layers, over the tokens of its row."""
    tokens = 4 if config.attention_window is None else TEXT
    storage = LatentCache.empty(config, 1, tokens, kind, mtp=False).storage
    return sum(x.nbytes for x in jax.tree.leaves(storage)) / tokens


def sizes() -> list[dict[str, Any]]:
    """Every choice's bytes, measured, and as the paper has them."""
    rows: list[dict[str, Any]] = []
    for choice in choices():
        size = allocated_bytes_per_token(choice.model, choice.cache)
        rows.append({"name": choice.name, "cache": choice.cache, "bytes_per_token": size,
                     "bytes_per_layer": size / choice.model.num_hidden_layers, "paper_kb": choice.paper_kb,
                     "paper_multiple": choice.paper_multiple})
    return [{**row, "multiple": row["bytes_per_token"] / rows[0]["bytes_per_token"]} for row in rows]


def quality(folder: Path, arguments: Arguments) -> list[dict[str, Any]]:
    """One run's held-out text through each format, then through each window; the first line is what others are
    compared with."""
    loaded = load_for_inference(FolderOptions(folder, arguments.step))
    config = dataclasses.replace(run_from_dict(json.loads((folder / "config.json").read_text())),
                                 mesh=MeshConfig(data=1))
    split = prepare(config.data, config.model.vocab_size, config.seed).validation
    if not split.text_bytes:
        raise ConfigError(f"--quality {folder}: the run holds no text out; train with data.validation_share above 0")
    trained, layout = config.model.attention_window, entry_layout(config.model)
    formats: tuple[CacheFormat, ...] = ("float32", "bf16", "float8", "int8")
    tries = [(str(kind), CacheChoice(kind, trained)) for kind in formats]
    if layout.plain:
        whole = EntryLayout((*layout.parts, layout.plain))
        tries += [(f"{kind}, rotary key too", CacheChoice(kind, trained, whole)) for kind in formats[2:]]
    tries += [(f"float32, window {window}", CacheChoice("float32", window)) for window in arguments.windows
              if window < min(config.batch.sequence_length, trained or config.batch.sequence_length)]
    about = {"run": folder.name, "attention": config.model.attention, "source": loaded.source}
    rows: list[dict[str, Any]] = []
    for name, choice in tries:
        read = cached_quality(config, loaded.params, loaded.router_bias, split, loaded.mesh, choice)
        rows.append({**about, "choice": name, **read})
    return [{**row, "more": row["bits_per_byte"] - rows[0]["bits_per_byte"]} for row in rows]


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    lines = ["# What a cache costs", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
             "| cache | format | bytes a token | KB in paper 1 | of V3's | printed there | bytes a token and layer |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for row in result["sizes"]:
        kb, multiple = ("" if value is None else f"{value:g}{unit}" for value, unit in
                        ((row["paper_kb"], ""), (row["paper_multiple"], "x")))
        lines.append(f"| {row['name']} | {row['cache']} | {row['bytes_per_token']:,.0f} | {kb} | "
                     f"{row['multiple']:.2f}x | {multiple} | {row['bytes_per_layer']:,.0f} |")
    lines += ["", "KB is 1000 bytes. Paper 1 prints 7.28x for LLaMA-3.1; its own numbers give 7.34x."]
    if result["quality"]:
        lines += ["", "| run | attention | read through | bytes a token | bits per byte | more |",
                  "|---|---|---|---:|---:|---:|"]
        lines += [f"| {row['run']} | {row['attention']} | {row['choice']} | {row['bytes_per_token']:,.0f} | "
                  f"{row['bits_per_byte']:.4f} | {row['more']:+.5f} |" for row in result["quality"]]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> Any:
    """The figure: bytes a token against bits per byte, a colour for each run and a mark for each choice."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    runs = list(dict.fromkeys((row["run"], row["attention"]) for row in rows))
    markers = dict(zip(dict.fromkeys(row["choice"] for row in rows), itertools.cycle("osD^v<>PX*dh"), strict=False))
    for row in rows:
        axes.plot(row["bytes_per_token"], row["bits_per_byte"], markers[row["choice"]], alpha=0.8,
                  color=f"C{runs.index((row['run'], row['attention']))}")
    for index, (run, attention) in enumerate(runs):
        axes.plot([], [], color=f"C{index}", linewidth=6, label=f"{run} ({attention})")
    for choice, marker in markers.items():
        axes.plot([], [], marker, color="gray", label=choice)
    axes.set(xscale="log", xlabel="bytes of cache a token", ylabel="bits per byte of held-out text",
             title="What a smaller cache costs")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        # Runs first: they set JAX up.
        runs = [row for folder in arguments.quality for row in quality(folder, arguments)]
        result = {"about": provenance(), "sizes": sizes(), "quality": runs}
        write_report(arguments.out, result, as_markdown(result), (lambda: draw(runs)) if runs else None)
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
