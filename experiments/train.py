"""Train a DeepSeek-V3-class model, or resume the run in a folder.

  python experiments/train.py --preset quickstart
  python experiments/train.py --preset tiny --mesh.scale-out 2 --mesh.scale-up 4 --mesh.simulate-devices 8
  python experiments/train.py --preset quickstart --data.path my_texts/ --steps 2000 --run-dir runs/mine
  python experiments/train.py --preset moonlight_16b --init-from Moonlight-16B-A3B/ --data.tokenizer tokenizer.json

Any setting of the preset can be overridden by its dotted name. A run folder that has a checkpoint is resumed. It gets
config.json, metrics.jsonl (one object a step), expert_load.jsonl, tokenizer.json and checkpoints/. Ctrl-C finishes the
step, saves, and stops.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dsv3_jax.config import RunConfig, named
from dsv3_jax.presets import RUNS
from dsv3_jax.training import runtime
from dsv3_jax.training.loop import train
from experiments.command_line import finish, say_line, standard_output_for_json, take_option


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run and where."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(help=f"Model and recipe to start from: {', '.join(RUNS)}.")] = "quickstart"
    run_dir: Path | None = None
    """Folder of the run; default runs/PRESET."""
    resume_from: int | None = None
    """Step of the checkpoint to resume from, when not the latest; later checkpoints are deleted."""
    init_from: Path | None = None
    """Folder of weights that a new run begins with: a published model, or an Orbax folder made from one by
    convert_checkpoint.py. Its config.json must describe the model that --preset and --model.* do."""
    json: bool = False
    """Print a JSON summary to standard output, everything else to standard error."""


def parse(arguments: list[str]) -> Arguments:
    """Arguments over the chosen preset's defaults."""
    preset, rest = take_option(arguments, "--preset", "quickstart")
    return tyro.cli(Arguments, args=rest, default=Arguments(config=named(RUNS, preset, "--preset"), preset=preset),
                    description=__doc__, config=(tyro.conf.AvoidSubcommands,))


def main() -> None:
    """Entry point."""
    arguments = parse(sys.argv[1:])
    with standard_output_for_json(arguments.json) as write_json:
        runtime.start(arguments.config.mesh, arguments.config.distributed)
        run_dir = arguments.run_dir or Path("runs") / arguments.preset
        summary = train(arguments.config, run_dir, say_line, arguments.resume_from, arguments.init_from)
        if jax.process_index() == 0:
            write_json(summary)


if __name__ == "__main__":
    finish(main)
