"""Count a preset's parameters, in total and as one token activates them.

  python experiments/count_parameters.py --preset deepseek_v3
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from dsv3_jax.codesign.counting import count_parameters, training_flops_per_token
from dsv3_jax.config import named
from dsv3_jax.presets import MODELS
from experiments.command_line import finish, print_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which model."""

    preset: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(MODELS)}.")] = "deepseek_v3"
    sequence_length: int = 4096
    """For the FLOPs of attention."""
    json: bool = False
    """Print one JSON object."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    config = named(MODELS, arguments.preset, "--preset")
    count = count_parameters(config)
    flops = training_flops_per_token(config, arguments.sequence_length, mtp=False)
    if arguments.json:
        print_json({"preset": arguments.preset, **count._asdict(), "training_flops_per_token": flops})
        return
    print(f"{arguments.preset}")
    for part, size in sorted(count.by_part.items(), key=lambda item: -item[1]):
        print(f"  {part:24s} {size:19,}")
    rows = [("main model", count.main), ("activated, with embedding and head", count.activated),
            ("activated, without embedding", count.activated_without_embedding),
            ("multi-token prediction, unique", count.mtp), ("  of it the layer itself", count.mtp_layer),
            ("  of it activated", count.mtp_activated)]
    for name, size in rows:
        print(f"{name:36s} {size / 1e9:9.3f}B" if size >= 1e8 else f"{name:36s} {size / 1e6:9.3f}M")
    print(f"training, causal, {arguments.sequence_length} tokens: {flops / 1e9:.1f} GFLOP per token without "
          "multi-token prediction")


if __name__ == "__main__":
    finish(main)
