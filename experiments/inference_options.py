"""What scripts share that run a model: where it comes from, on which devices, and options of sampling."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, Precision, check_expert_layout
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.cache import CacheFormat, bytes_per_token
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.expert_slots import deployment_on, expert_layers
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.pace import Targets
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.interop.published_config import read_json
from dsv3_jax.interop.run_checkpoint import RunCheckpoint
from dsv3_jax.interop.tokenizer import Tokenizer
from dsv3_jax.mesh import make_mesh, mesh_shape
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, holds_float8
from dsv3_jax.training import runtime

WORKER_KEY_VARIABLE = "SERVE_WORKER_KEY"
CPU_CACHE_BYTES = 2 * 2 ** 30
"""Most memory that an engine's pages take where the device does not say how much it has."""
SHARE_OF_FREE_MEMORY = 0.8
"""What pages take of a device's memory beside the weights; the rest is for what programs compute with."""


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


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much the engine holds at a time."""

    rows: int = 16
    """Requests that decode at a time, on each device; others wait."""
    context: int | None = None
    """Most tokens of a request, prompt and answer together; default the model's window, but 4096 at most."""
    pages: int | None = None
    """Pages of the cache on each device; default enough for all rows, or what the device's memory has room for."""
    page_size: int = 64
    """Tokens of a page."""
    waiting: int = 1024
    """Most requests that wait for a row; further ones are refused."""
    reuse: bool = True
    """Let requests that begin alike share pages."""
    redundant: int | None = None
    """Slots for replicas of experts, beyond the model's own (the sum must divide by the devices that share experts);
    0 counts what each device gets, without replicas."""
    by_group: bool = False
    """Keep an expert's replicas on its router group's node, so that the node limit holds for them too."""
    rebalance_every_s: float | None = None
    """Place replicas anew so often, by the load since the last time, while serving goes on."""


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
                          speculative=options.speculative, spread=options.mesh.zero == "full",
                          transport=options.mesh.transport, combine=options.mesh.combine, dual=options.mesh.dual)
    return loaded, tokenizer, generator, generator.prepare(loaded.params, loaded.router_bias)


def load_engine(options: GeneratorOptions, engine: EngineOptions, targets: Targets,
                **handing_over: Any) -> tuple[str, Engine]:
    """Which weights the folder's are, and an engine with its programs compiled; `handing_over` is for `Engine`.

    Raises:
      ConfigError: as `load_for_inference` and `Engine`; several processes, of which only one hears requests.
    """
    loaded = load_for_inference(options)
    if jax.process_count() > 1:
        raise ConfigError(f"an engine runs in one process, and this is one of {jax.process_count()}: start it on one "
                          "host, with --mesh.* for the devices there")
    placement = None
    if engine.redundant is not None:
        placement = Placement.in_order(expert_layers(loaded.model), deployment_on(
            loaded.model, loaded.mesh, engine.redundant, engine.by_group))
    elif engine.rebalance_every_s is not None:
        raise ConfigError(f"--engine.rebalance-every-s ({engine.rebalance_every_s:g}) wants --engine.redundant: the "
                          "slots that replicas may take, or 0")
    on_mesh = ModelOnMesh(loaded.model, loaded.mesh, precision=loaded.precision, cache=options.cache,
                          speculative=options.speculative, spread=options.mesh.zero == "full", placement=placement,
                          transport=options.mesh.transport, combine=options.mesh.combine, dual=options.mesh.dual,
                          reads_only="hand_over" in handing_over)
    weights = jax.block_until_ready(on_mesh.prepare(loaded.params, loaded.router_bias))
    source = loaded.source
    del loaded  # what the weights were made from leaves its room to pages
    return source, Engine(on_mesh, weights, engine_sizes(engine, on_mesh), targets,
                          rebalance_every_s=engine.rebalance_every_s, **handing_over)


def log(line: str) -> None:
    """A server's line, on standard error, with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def address(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT.

    Raises:
      ConfigError: it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} ({text}) must be HOST:PORT, such as 127.0.0.1:8100")
    return host, int(port)


def worker_key() -> bytes:
    """What a router and its workers know.

    Raises:
      ConfigError: it is not in the environment.
    """
    key = os.environ.get(WORKER_KEY_VARIABLE, "")
    if not key:
        raise ConfigError(f"{WORKER_KEY_VARIABLE} is not set: give the server and its workers the same secret by it")
    return key.encode()


def engine_sizes(options: EngineOptions, on_mesh: ModelOnMesh) -> Sizes:
    """Sizes with the defaults filled in. Call it when the weights are on the devices.

    Raises:
      ConfigError: no room for one request.
    """
    context = min(on_mesh.window, 4096) if options.context is None else options.context
    pages = options.pages
    if pages is None:
        a_row = -(-context // options.page_size)
        page_bytes = options.page_size * bytes_per_token(on_mesh.model, on_mesh.cache, on_mesh.speculative)
        pages = min(options.rows * a_row, int(_free_bytes(on_mesh.mesh) * SHARE_OF_FREE_MEMORY) // page_bytes)
        if pages < a_row:
            raise ConfigError(f"engine.context ({context}) wants {a_row} pages of {page_bytes:,} bytes on each device, "
                              f"and there is room for {pages}: lower it, take --cache float8, or spread the model over "
                              "more devices (--mesh.*)")
    return Sizes(options.rows, pages, options.page_size, context, options.waiting, options.reuse)


def _free_bytes(mesh: jax.sharding.Mesh) -> int:
    """Of the device of `mesh` that has least."""
    told = [device.memory_stats() for device in mesh.local_devices]
    return min((stats["bytes_limit"] - stats["bytes_in_use"] for stats in told if stats and "bytes_limit" in stats),
               default=round(CPU_CACHE_BYTES / SHARE_OF_FREE_MEMORY))
