"""Convert a model's weights between the published format, Orbax and training runs, without holding them in memory.

  python experiments/convert_checkpoint.py DeepSeek-V3/ v3_orbax/                      published -> Orbax, bit for bit
  python experiments/convert_checkpoint.py v3_orbax/ DeepSeek-V3-again/                 and back, bit for bit
  python experiments/convert_checkpoint.py DeepSeek-V3/ v3_bf16/ --to published --format bfloat16
  python experiments/convert_checkpoint.py runs/quickstart/ model/ --format bfloat16    a run, for a serving stack
  python experiments/convert_checkpoint.py --dry-run --preset deepseek_v3 --json        every tensor of the format

Source and target are folders, and what the source is follows from what is in it:

  published   config.json and safetensors files, as on a model hub
  Orbax       config.json and weights/, an Orbax checkpoint of the same tensors under the same names
  run         a run folder of experiments/train.py; its float32 weights (or --ema, their moving average)

The target appears when it is complete, and not at all after an error. An existing one is refused.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from dsv3_jax.config import ConfigError, named
from dsv3_jax.interop.convert import Kind, Progress, convert, dry_run, open_store
from dsv3_jax.interop.published_config import Format
from dsv3_jax.interop.run_checkpoint import RunCheckpoint
from dsv3_jax.interop.safetensors_folder import SafetensorsFolder
from dsv3_jax.presets import MODELS
from dsv3_jax.training.metrics import duration
from experiments.command_line import finish, say_line, standard_output_for_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to convert, and into what."""

    source: tyro.conf.Positional[Path | None] = None
    """Folder to read."""
    target: tyro.conf.Positional[Path | None] = None
    """Folder to make."""
    format: Literal["float8", "bfloat16", "float32", "same"] = "same"
    """float8: e4m3 in blocks of 128 x 128 with float32 scales, and the rest bfloat16, as DeepSeek-V3 is published. A
    run is float32; `same` keeps every tensor's type, bit for bit."""
    to: Kind | None = None
    """What to make; by default Orbax from a published model, and a published model from all else."""
    shard_gigabytes: float = 5.0
    """Largest safetensors file, unless one tensor is larger."""
    step: int | None = None
    """Of a run, the checkpoint; default the latest."""
    ema: bool = False
    """Of a run, the moving average of the weights instead of the last ones."""
    dry_run: bool = False
    """Only list name, shape and dtype of every tensor that would be written; with --preset no source is needed."""
    preset: str | None = None
    """For --dry-run: the model, by name."""
    report_every: float = 5.0
    """Seconds between lines of progress."""
    json: bool = False
    """Print one JSON value to standard output: the list of a dry run, or a summary; everything else to standard
    error."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    # A kill by a scheduler unwinds like an error, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with standard_output_for_json(arguments.json) as write_json:
        write_json(_dry_run(arguments) if arguments.dry_run else _convert(arguments))


def _dry_run(arguments: Arguments) -> list[dict[str, Any]]:
    if (arguments.preset is None) == (arguments.source is None):
        raise ConfigError("--dry-run needs a source folder or --preset NAME, and not both; presets are "
                          + ", ".join(MODELS))
    if arguments.preset is not None:
        config = named(MODELS, arguments.preset, "--preset")
        # Without weights there is nothing to be the same as; float8 is how the model of the format is published.
        fmt: Format = "float8" if arguments.format == "same" else arguments.format
    else:
        assert arguments.source is not None
        store = open_store(arguments.source, arguments.step, arguments.ema)
        config, found = store.config, store.format()
        fmt = found if arguments.format == "same" else arguments.format
    tensors = dry_run(config, fmt)
    for tensor in tensors if not arguments.json else ():
        say_line(f"{tensor['name']} {tensor['shape']} {tensor['dtype']}")
    print(f"{len(tensors)} tensors in {fmt}", file=sys.stderr)
    return tensors


def _convert(arguments: Arguments) -> dict[str, Any]:
    if arguments.source is None or arguments.target is None:
        raise ConfigError("give a source and a target folder, or --dry-run --preset NAME")
    if arguments.preset is not None:
        raise ConfigError("--preset goes with --dry-run; a conversion takes the model from the source's config.json")
    if arguments.target.exists():
        raise ConfigError(f"target {arguments.target} exists: choose another folder, or remove it first")
    began = time.perf_counter()
    store = open_store(arguments.source, arguments.step, arguments.ema)
    kind: Kind = arguments.to or ("orbax" if isinstance(store, SafetensorsFolder) else "published")
    what = ("published model" if isinstance(store, SafetensorsFolder) else
            "run" if isinstance(store, RunCheckpoint) else "Orbax weights")
    say_line(f"source {what} {store.where} in {store.format()}; target {kind} {arguments.target} in {arguments.format}")
    last: list[Progress] = []
    report = _reporter(arguments.report_every, last)
    convert(store, arguments.target, kind, arguments.format, int(arguments.shard_gigabytes * 1e9), report)
    seconds = time.perf_counter() - began
    done = last[0]
    say_line(f"done: {done.tensors} tensors, {done.bytes / 1e9:.3f} GB in {duration(seconds)}, {arguments.target}")
    return {"source": str(arguments.source), "target": str(arguments.target), "kind": kind, "tensors": done.tensors,
            "bytes": done.bytes, "seconds": seconds}


def _reporter(every: float, last: list[Progress]) -> Callable[[Progress], None]:
    """Prints a line at most every so many seconds; `last` always holds the latest progress."""
    began = said = time.perf_counter()

    def report(done: Progress) -> None:
        nonlocal said
        last[:] = [done]
        now = time.perf_counter()
        if now - said < every and done.bytes < done.of_bytes:
            return
        said = now
        speed = done.bytes / max(now - began, 1e-9)
        say_line(f"progress tensors {done.tensors}/{done.of_tensors} gigabytes {done.bytes / 1e9:.3f}/"
                 f"{done.of_bytes / 1e9:.3f} mb_per_second {speed / 1e6:.1f} eta "
                 f"{duration((done.of_bytes - done.bytes) / max(speed, 1))}")
    return report


if __name__ == "__main__":
    finish(main)
