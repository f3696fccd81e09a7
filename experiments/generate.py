"""Continue prompts with a trained run.

  python experiments/generate.py runs/quickstart --prompt "The state of the Union"
  echo "My fellow citizens" | python experiments/generate.py runs/quickstart --prompt -

Streams the text as it is made. The same seed gives the same text.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from dsv3_jax.config import ConfigError, MeshConfig, run_from_dict
from dsv3_jax.inference.generate import Generator
from dsv3_jax.interop.tokenizer import Tokenizer
from dsv3_jax.mesh import make_mesh
from dsv3_jax.training import runtime
from dsv3_jax.training.checkpoint import Checkpoints
from experiments.command_line import finish, print_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to continue, and how."""

    run_dir: tyro.conf.Positional[Path]
    """A run folder of experiments/train.py."""
    prompt: str = "The American people"
    """Text to continue; - reads it from standard input."""
    tokens: int = 128
    """Most new tokens."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    seed: int = 0
    step: int | None = None
    """Checkpoint to use; default the latest."""
    ema: bool = False
    """Use the moving average of the weights instead of the last ones."""
    json: bool = False
    """Print one JSON object with prompt, text and speed, instead of streaming."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    path = arguments.run_dir / "config.json"
    if not path.exists():
        raise ConfigError(f"run folder {arguments.run_dir} has no config.json: give a folder made by "
                          "experiments/train.py")
    config = dataclasses.replace(run_from_dict(json.loads(path.read_text())), mesh=MeshConfig(data=1))
    runtime.start(config)
    if not (arguments.run_dir / "tokenizer.json").exists():
        raise ConfigError(f"run folder {arguments.run_dir} has no tokenizer.json: it was trained on bare token ids, "
                          "which can't be shown as text")
    tokenizer = Tokenizer.load(arguments.run_dir / "tokenizer.json")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, position = Checkpoints(arguments.run_dir / "checkpoints", keep=10 ** 6).restore(
        config, mesh, arguments.step)
    if arguments.ema and state.ema is None:
        raise ConfigError("--ema: this run keeps no moving average; train with --optimizer.ema-decay")
    prompt = sys.stdin.read().rstrip("\n") if arguments.prompt == "-" else arguments.prompt
    ids = np.concatenate([[tokenizer.bos], tokenizer.encode(prompt)]).astype(np.int32)
    made: list[int] = []
    shown = ""
    if not arguments.json:
        print(prompt, end="", flush=True)
    began = time.perf_counter()
    params = state.ema if arguments.ema and state.ema is not None else state.params
    for token in Generator(config, mesh)(params, state.router_bias, ids, arguments.tokens, seed=arguments.seed,
                                         temperature=arguments.temperature, stop=tokenizer.eos):
        if token == tokenizer.eos:
            break
        made.append(token)
        text = tokenizer.decode(made)
        if not arguments.json and not text.endswith("�"):  # an unfinished character waits for its other bytes
            print(text[len(shown):], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - began
    if arguments.json:
        print_json({"prompt": prompt, "text": tokenizer.decode(made), "tokens": len(made), "seconds": seconds,
                    "step": position.step})
    else:
        print()
        print(f"{len(made)} tokens in {seconds:.1f} s, checkpoint of step {position.step}", file=sys.stderr)


if __name__ == "__main__":
    finish(main)
