"""What scripts share that run a model: where it comes from, on which devices, and options of sampling."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, Precision, check_expert_layout
from dsv3_jax.inference.cache import CacheFormat
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.interop.published_config import read_json
from dsv3_jax.interop.run_checkpoint import RunCheckpoint
from dsv3_jax.interop.tokenizer import Tokenizer
from dsv3_jax.mesh import make_mesh, mesh_shape
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, holds_float8
from dsv3_jax.training import runtime


class Loaded(NamedTuple):
    """A model to run, wherever it came from."""

    model: ModelConfig
    precision: Precision
    mesh: jax.sharding.Mesh
    params: nnx.State
    """In compute precision (router and norms in float32), laid out on the mesh."""
    router_bias: nnx.State
    source: str
    """For people: which weights."""


DEFAULT_SAMPLING = Sampling(temperature=0.8)


def sampling_of_row(sampling: Sampling, row: int) -> Sampling:
    """Each row of a batch, or answer of a conversation, has a seed of its own."""
    return dataclasses.replace(sampling, seed=(sampling.seed + row) % 2 ** 32)


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """Which model, and how it runs."""

    folder: tyro.conf.Positional[Path]
    """A run folder of experiments/train.py, a published model (config.json and safetensors), or an Orbax folder of
    weights."""
    step: int | None = None
    """Of a run, the checkpoint; default the latest."""
    ema: bool = False
    """Of a run, the moving average of the weights instead of the last ones."""
    precision: Precision | None = None
    """Of weights and activations; default that of the run, bf16 for a published model."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Devices to spread over; by default one. `--mesh.zero full` spreads all weights, not only experts."""


@dataclasses.dataclass(frozen=True)
class GeneratorOptions(FolderOptions):
    """A model that generates."""

    speculative: bool = False
    """Draft tokens with the multi-token-prediction modules and verify several at once."""
    cache: CacheFormat | None = None
    """Format of the cache: bf16, float32, float8 or int8; default the run's precision."""


def load_for_inference(options: FolderOptions) -> Loaded:
    """The model in the folder, each device reading its part.

    Raises:
      ConfigError: no model in the folder or a damaged one, no such checkpoint, or a mesh that does not fit.
    """
    runtime.start(options.mesh)
    store = open_store(options.folder, options.step, options.ema)
    check_expert_layout(store.config, options.mesh)
    precision = options.precision or "bf16"
    if options.precision is None and isinstance(store, RunCheckpoint):
        precision = read_json(options.folder / "config.json")["precision"]
    devices = jax.devices()
    mesh = make_mesh(options.mesh, devices[:math.prod(mesh_shape(options.mesh, len(devices)))])
    params, router_bias = load(store, mesh, COMPUTE_DTYPE[precision], float8=holds_float8(precision),
                               say=functools.partial(print, file=sys.stderr))
    return Loaded(store.config, precision, mesh, params, router_bias, str(store.where))


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer beside a model's weights.

    Raises:
      ConfigError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no tokenizer.json, so text can be neither read nor shown: put the model's own "
                          "there")
    return Tokenizer.load(path)


def load_generator(options: GeneratorOptions) -> tuple[Loaded, Tokenizer, Generator, nnx.State]:
    """The folder's model and tokenizer, and a generator with its weights prepared."""
    tokenizer = tokenizer_in(options.folder)
    loaded = load_for_inference(options)
    generator = Generator(loaded.model, loaded.mesh, precision=loaded.precision, cache=options.cache,
                          speculative=options.speculative, spread=options.mesh.zero == "full")
    return loaded, tokenizer, generator, generator.prepare(loaded.params, loaded.router_bias)
