"""What generate.py and chat.py share: a folder made ready for inference, and options of sampling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, run_from_dict
from dsv3_jax.inference.generate import Generator, Weights
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.interop.tokenizer import Tokenizer
from dsv3_jax.mesh import make_mesh
from dsv3_jax.precision.recipe import Precision
from dsv3_jax.training import runtime
from dsv3_jax.training.checkpoint import Checkpoints


class Loaded(NamedTuple):
    """A model to generate with, wherever it came from."""

    model: ModelConfig
    precision: Precision
    mesh: jax.sharding.Mesh
    params: nnx.State
    """float32 or compute precision, laid out on the mesh."""
    router_bias: nnx.State
    tokenizer: Tokenizer
    source: str
    """For people: which checkpoint."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn: the options of `dsv3_jax.inference.sampling.Sampling`, in the order they are applied."""

    repetition_penalty: float = 1.0
    """Above 1, tokens that the text has become less likely."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this times as likely as the likeliest."""
    seed: int = 0

    def sampling(self, row: int = 0) -> Sampling:
        """For one row of a batch; each row has a seed of its own."""
        return Sampling(**{**dataclasses.asdict(self), "seed": (self.seed + row) % 2 ** 32})


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """Which model, and how it runs."""

    folder: tyro.conf.Positional[Path]
    """A run folder of experiments/train.py."""
    step: int | None = None
    """Checkpoint to use; default the latest."""
    ema: bool = False
    """Use the moving average of the weights instead of the last ones."""
    speculative: bool = False
    """Draft tokens with the multi-token-prediction modules and verify several at once."""


def load_for_inference(folder: Path, step: int | None = None, ema: bool = False) -> Loaded:
    """The model in `folder` on one device.

    The one place that knows kinds of folders: another kind is a branch here that returns the same `Loaded`.

    Raises:
      ConfigError: not a run folder, one without a tokenizer, or no such checkpoint.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"run folder {folder} has no config.json: give a folder made by experiments/train.py")
    config = dataclasses.replace(run_from_dict(json.loads(path.read_text())), mesh=MeshConfig(data=1))
    runtime.start(config)
    if not (folder / "tokenizer.json").exists():
        raise ConfigError(f"run folder {folder} has no tokenizer.json: it was trained on bare token ids, which can't "
                          "be shown as text")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, position = Checkpoints(folder / "checkpoints", keep=10 ** 6).restore(config, mesh, step)
    if ema and state.ema is None:
        raise ConfigError("--ema: this run keeps no moving average; train with --optimizer.ema-decay")
    params = state.ema if ema and state.ema is not None else state.params
    return Loaded(config.model, config.precision, mesh, params, state.router_bias,
                  Tokenizer.load(folder / "tokenizer.json"), f"checkpoint of step {position.step}")


def load_generator(options: FolderOptions) -> tuple[Loaded, Generator, Weights]:
    """The folder's model, and a generator with its weights prepared."""
    loaded = load_for_inference(options.folder, options.step, options.ema)
    generator = Generator(loaded.model, loaded.mesh, precision=loaded.precision, speculative=options.speculative)
    return loaded, generator, generator.prepare(loaded.params, loaded.router_bias)
