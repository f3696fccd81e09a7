"""LogFMT-nBit, the logarithmic format that paper 1 tried for the combine (section 3.2): error, bias, and cost.

  python experiments/logfmt.py
  python experiments/logfmt.py --run runs/quickstart --out experiments/results/logfmt

- Error against bits, beside E4M3 and E5M2 with a scale a tile of 1x128, E5M6 and BF16: for Gaussian numbers, heavy
  tails (Student's t, 3 degrees of freedom) and, with --run, the outputs of a trained model's routed experts on text
  held out, computed in float32.
- Bias: the sum of the errors of magnitudes over the sum of magnitudes, with its standard error over tiles, when numbers
  are rounded as numbers, as the format says, and when their logarithms are. With values a factor r apart and a density
  that is smooth and falls to zero on both sides, it is -(log r)^2 / 12 and +(log r)^2 / 24 for small log r: only where
  the density is flat between two values does rounding as numbers, the format's, have none.
- Cost: the time of encoding and decoding the bf16 outputs of a paper-size layer on the device at hand, beside the time
  that the bytes saved would take on a link. The floor is what reads and writes alone take.

What the format does to the loss when a model trains with it tells logfmt_training.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.config import ConfigError, Execution, MeshConfig, run_from_dict
from dsv3_jax.mesh import gather_for_compute
from dsv3_jax.nn.block import gathered, run_stack
from dsv3_jax.nn.model import DeepSeekV3, model_structure
from dsv3_jax.nn.router import Routing
from dsv3_jax.precision.logfmt import LogFMT
from dsv3_jax.precision.quantised import ROW, Quantised, QuantisedE5M6
from dsv3_jax.training import runtime
from dsv3_jax.training.tokens import prepare
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report
from experiments.inference_options import FolderOptions, load_for_inference
from pallas_kernels.logfmt.reference import Ends, step_of
from pallas_kernels.quantise.reference import spread, tile_scales

TILE = ROW[1]
E5M2_MAX = 57344.0
LINKS = {"InfiniBand, 50 GB/s": 50e9, "NVLink, 160 GB/s": 160e9, "NVLink, 200 GB/s": 200e9}
"""Bytes/s one way: 400 Gbit/s; what is reached of an H800's NVLink, and nominal (paper 1, section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    run: Path | None = None
    """A run folder of experiments/train.py, whose experts' outputs are rounded too."""
    step: int | None = None
    """Checkpoint to use; default the latest."""
    bits: tuple[int, ...] = tuple(range(4, 17))
    """Of LogFMT, from 4 to 16."""
    tiles: int = 2 ** 15
    """Of 128 numbers, at most, of each kind."""
    cost_rows: int = 4096
    """Tokens whose outputs are encoded and decoded against the clock; 0 leaves that out."""
    cost_width: int = 7168
    """Channels of each."""
    cost_bits: tuple[int, ...] = (8, 10)
    """Of LogFMT there."""
    repeat: int | None = None
    """How often one program does so; default 100 on an accelerator, 1 elsewhere."""
    seed: int = 0
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


class Format(NamedTuple):
    """A way to say numbers in fewer bits."""

    name: str
    bits: float
    """A number, with what its tile has beside: a float32 scale, or two ends in bf16, the dtype that is combined."""
    rounded: Callable[[jax.Array], jax.Array]
    """float32 [M, K] -> what it says, float32."""


def formats(bits: tuple[int, ...]) -> list[Format]:
    """LogFMT of these bits first."""
    logs = [Format(f"LogFMT-{n}", n + 32 / TILE, functools.partial(rounded_to_logfmt, bits=n)) for n in bits]
    return [*logs, Format("E4M3", 8 + 32 / TILE, rounded_to_e4m3), Format("E5M2", 8 + 32 / TILE, rounded_to_e5m2),
            Format("E5M6", 12 + 32 / TILE, rounded_to_e5m6), Format("BF16", 16, rounded_to_bf16)]


@functools.partial(jax.jit, static_argnames="bits")
def rounded_to_logfmt(x: jax.Array, bits: int) -> jax.Array:
    """Encoded and decoded."""
    return LogFMT.of(x, bits).dequantise()


@jax.jit
def rounded_to_e4m3(x: jax.Array) -> jax.Array:
    """The largest magnitude of a tile of 1x128 becomes E4M3's largest."""
    return Quantised.of(x, ROW).dequantise()


@jax.jit
def rounded_to_e5m2(x: jax.Array) -> jax.Array:
    """Likewise, in E5M2."""
    scales, inverses = tile_scales(x, ROW, False, E5M2_MAX)
    return (x * spread(inverses, ROW, x.shape)).astype(jnp.float8_e5m2).astype(jnp.float32) * spread(
        scales, ROW, x.shape)


@jax.jit
def rounded_to_e5m6(x: jax.Array) -> jax.Array:
    """The scale of a tile is a power of two."""
    return QuantisedE5M6.of(x).dequantise()


@jax.jit
def rounded_to_bf16(x: jax.Array) -> jax.Array:
    """No tiles, no scales."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@functools.partial(jax.jit, static_argnames="bits")
def rounded_in_logarithms(x: jax.Array, bits: int) -> jax.Array:
    """LogFMT but for the rounding: to the code whose logarithm is nearest. Below the range it is the same."""
    held = LogFMT.of(x, bits)
    smallest, largest = (spread(end, ROW, x.shape) for end in jnp.split(held.ends, 2, axis=-1))
    step = step_of(Ends(smallest, largest), bits)
    steps_down = jnp.log2(largest / jnp.maximum(jnp.abs(x), smallest)) / jnp.where(step > 0, step, 1)
    values = jnp.sign(x) * largest * jnp.exp2(-step * jnp.round(steps_down))
    return jnp.where((jnp.abs(x) >= smallest) & (smallest > 0), values, held.dequantise())


@functools.partial(jax.jit, static_argnames="bits")
def mean_square_step(x: jax.Array, bits: int) -> jax.Array:
    """(log r)^2 of LogFMT's steps, the mean over x weighted by its magnitudes."""
    steps = step_of(Ends(*jnp.split(LogFMT.of(x, bits).ends, 2, axis=-1)), bits) * np.log(2)
    return jnp.sum(spread(steps ** 2, ROW, x.shape) * jnp.abs(x)) / jnp.sum(jnp.abs(x))


class Data(NamedTuple):
    """Numbers to round."""

    name: str
    values_MK: np.ndarray
    """float32."""


def datasets(arguments: Arguments) -> Iterator[Data]:
    """Random numbers, then the run's, which set JAX up."""
    if arguments.run is not None:
        yield from expert_outputs(arguments.run, arguments.step, arguments.tiles)
    else:
        runtime.start(MeshConfig(data=1))
    rng = np.random.default_rng(arguments.seed)
    shape = (-(-arguments.tiles // 8), 8 * TILE)
    yield Data("Gaussian", rng.standard_normal(shape, np.float32))
    yield Data("Student t, 3 degrees", rng.standard_t(3, shape).astype(np.float32))


def expert_outputs(folder: Path, step: int | None, tiles: int) -> Iterator[Data]:
    """What a combine would carry, of all MoE layers of a run, for as much held-out text as makes so many tiles: each
    token's first expert's output, and the weighted sum over its experts."""
    loaded = load_for_inference(FolderOptions(folder, step, precision="float32"))
    config = run_from_dict(json.loads((folder / "config.json").read_text()))
    tokens = prepare(config.data, config.model.vocab_size, config.seed).validation.tokens
    length = config.batch.sequence_length
    layers, width = config.model.num_moe_layers, config.model.hidden_size
    rows = min(len(tokens) // length, max(1, tiles // (layers * length * -(-width // TILE))))
    if not rows:
        raise ConfigError(f"--run {folder}: the run holds out {len(tokens)} tokens, fewer than the {length} of a "
                          "sequence; train with a larger data.validation_share")
    structure = model_structure(loaded.model, loaded.precision)

    @jax.jit
    def run(params: nnx.State, router_bias: nnx.State, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return routed_outputs(nnx.merge(structure, gather_for_compute(params), router_bias), tokens_BT)[:2]
    with jax.set_mesh(loaded.mesh):
        outputs = run(loaded.params, loaded.router_bias, np.asarray(tokens[:rows * length], np.int32).reshape(rows, -1))
    for name, values in zip(("an expert's output", "sum over a token's experts"), outputs, strict=True):
        yield Data(name, np.asarray(values).reshape(-1, width))


def routed_outputs(model: DeepSeekV3, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the MoE layers, [L, B, T, D]: what each token's first expert gives, without its weight, and what its experts
    add to it together; and [B, T, D] after the last layer, before the final norm."""
    positions_T, execution = jnp.arange(tokens_BT.shape[1]), Execution()
    hidden_BTD = gathered(model.embed_tokens)(tokens_BT)
    if model.config.first_k_dense_replace:
        hidden_BTD, _ = run_stack(model.dense_layers, hidden_BTD, positions_T, execution)
    graphdef, layers = nnx.split(model.moe_layers)

    def layer(hidden_BTD: jax.Array, state: nnx.State) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        block = nnx.merge(graphdef, gather_for_compute(state))
        hidden_BTD += block.self_attn(block.input_layernorm(hidden_BTD), positions_T)
        normed = block.post_attention_layernorm(hidden_BTD)
        routing = block.mlp.gate(normed)
        first = Routing(routing.experts_K[..., :1], jnp.ones_like(routing.weights_K[..., :1]), routing.scores_E)
        one, together = (block.mlp.experts(normed, each, execution)[0] for each in (first, routing))
        return block.feed_forward(hidden_BTD, execution)[0], (one, together)
    hidden_BTD, (one, together) = jax.lax.scan(layer, hidden_BTD, layers)
    return one, together, hidden_BTD


class Error(NamedTuple):
    """How far rounding is off, relative."""

    rms: float
    """The root of the sum of squared errors over that of squares."""
    bias: float
    """The sum of errors of magnitudes over the sum of magnitudes."""
    bias_noise: float
    """Its standard error, tiles being independent."""
    to_zero: float
    """Share of the numbers that became zero and were not."""


def error_of(rounded: np.ndarray, x_MK: np.ndarray) -> Error:
    """Summed in float64."""
    x_MK, rounded = x_MK.astype(np.float64), rounded.astype(np.float64)
    difference = rounded - x_MK
    grown, total = np.abs(rounded) - np.abs(x_MK), np.abs(x_MK).sum()
    tiles = np.add.reduceat(grown, np.arange(0, x_MK.shape[1], TILE), axis=1)
    return Error(float(np.sqrt(np.sum(difference ** 2) / np.sum(x_MK ** 2))), float(grown.sum() / total),
                 float(tiles.std() * np.sqrt(tiles.size) / total), float(np.mean((rounded == 0) & (x_MK != 0))))


def errors(data: Data, bits: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every format's, and of LogFMT with the other rounding."""
    x = jnp.asarray(data.values_MK)
    tries = [(*each, "numbers") for each in formats(bits)]
    tries += [(f"LogFMT-{n}", n + 32 / TILE, functools.partial(rounded_in_logarithms, bits=n), "logarithms")
              for n in bits]
    found: list[dict[str, Any]] = [
        {"data": data.name, "count": data.values_MK.size, "format": name, "bits": size, "rounded_as": rounding,
         **error_of(np.asarray(rounded(x)), data.values_MK)._asdict()}
        for name, size, rounded, rounding in tries]
    squares = {f"LogFMT-{n}": float(mean_square_step(x, n)) for n in bits}
    factor = {"numbers": -1 / 12, "logarithms": 1 / 24}
    return [{**row, "expected_bias": factor[row["rounded_as"]] * squares[row["format"]]
             if row["format"] in squares else None} for row in found]


def seconds_each(step: Callable[[jax.Array], jax.Array], x: jax.Array, repeat: int) -> float:
    """Seconds of `x = step(x)`, in a program that does it `repeat` times, the best of three."""
    program = jax.jit(lambda x: jax.lax.fori_loop(0, repeat, lambda _, x: step(x), x))
    program(x).block_until_ready()
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        program(x).block_until_ready()
        taken.append((time.perf_counter() - began) / repeat)
    return min(taken)


def costs(arguments: Arguments) -> list[dict[str, Any]]:
    """One row for each n: time to encode and decode, its floor, and the time of what is saved on each link."""
    device, rows, width = jax.devices()[0], arguments.cost_rows, arguments.cost_width
    repeat = arguments.repeat or (1 if device.platform == "cpu" else 100)
    x = jax.random.normal(jax.random.key(arguments.seed), (rows, width), jnp.bfloat16)
    # Reads and writes x once. A change so small that it is lost makes XLA copy all the same.
    copy_rate = 2 * x.nbytes / seconds_each(lambda x: x + jnp.bfloat16(2.0 ** -100), x, repeat)
    known = next((h for h in HARDWARE.values() if device.device_kind.startswith(h.device_kind)), None)
    found = []
    for bits in arguments.cost_bits:
        kept = jax.eval_shape(functools.partial(LogFMT.of, bits=bits), x)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        moved, saved = 2 * (x.nbytes + held), x.nbytes - held
        seconds = seconds_each(functools.partial(rounded_to_logfmt, bits=bits), x, repeat)
        found.append({
            "bits": bits, "rows": rows, "width": width, "bytes": held, "bytes_saved": saved, "seconds": seconds,
            "bytes_read_and_written": moved, "copy_rate": copy_rate, "share_of_copy_rate": moved / seconds / copy_rate,
            "floor_here": moved / known.hbm_bandwidth if known else None,
            "floor_h800": moved / HARDWARE["h800"].hbm_bandwidth,
            "transfer_saved": {name: saved / rate for name, rate in LINKS.items()}})
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    return "\n".join([
        "# LogFMT: error, bias and cost", "", f"`{about['command']}`", "",
        f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
        "Bias is that of magnitudes, with its standard error; expected: for small steps and a smooth density.", "",
        *_table_of_errors(result["errors"]), *_table_of_costs(result["costs"])]) + "\n"


def _table_of_errors(rows: list[dict[str, Any]]) -> list[str]:
    others = {(row["data"], row["format"]): row for row in rows if row["rounded_as"] == "logarithms"}
    lines = ["| data | format | bits a number | RMS error | bias | expected | bias, rounded as logarithms | expected |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        if row["rounded_as"] != "numbers":
            continue
        cells = [row["data"], row["format"], f"{row['bits']:g}", f"{row['rms']:.2e}"]
        for each in (row, others.get((row["data"], row["format"]))):
            cells += ["", ""] if each is None else [
                f"{each['bias']:+.1e} +- {each['bias_noise']:.0e}",
                "" if each["expected_bias"] is None else f"{each['expected_bias']:+.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table_of_costs(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shape, copies = f"[{rows[0]['rows']}, {rows[0]['width']}]", f"{rows[0]['copy_rate'] / 1e9:,.0f} GB/s"
    lines = ["", f"Encoding and decoding {shape} in bf16; in brackets, as a multiple of the time that the bytes saved "
             f"take on the link. Floor: bytes over memory bandwidth. Copies here: {copies}.", "",
             "| bits | bytes saved | both | floor here | floor on an H800 | "
             + " | ".join(f"saved on {name}" for name in LINKS) + " |",
             "|---:|---:|---:|---:|---:|" + "---:|" * len(LINKS)]
    for row in rows:
        floor = "" if row["floor_here"] is None else f"{row['floor_here'] * 1e6:,.1f} us"
        links = [f"{saved * 1e6:,.1f} us ({row['seconds'] / saved:,.2f}x)"
                 for saved in row["transfer_saved"].values()]
        lines.append(f"| {row['bits']} | {row['bytes_saved']:,} | {row['seconds'] * 1e6:,.1f} us | {floor} | "
                     f"{row['floor_h800'] * 1e6:,.1f} us | " + " | ".join(links) + " |")
    return lines


def draw(rows: list[dict[str, Any]]) -> Any:
    """The figure: error against bits, and bias against bits with both roundings."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    markers = {"E4M3": "o", "E5M2": "s", "E5M6": "D", "BF16": "^"}
    for index, name in enumerate(dict.fromkeys(row["data"] for row in rows)):
        mine = [row for row in rows if row["data"] == name]
        logs = [row for row in mine if row["format"].startswith("LogFMT") and row["rounded_as"] == "numbers"]
        left.plot([row["bits"] for row in logs], [row["rms"] for row in logs], ".-", color=f"C{index}", label=name)
        for row in mine:
            if row["format"] in markers:
                left.plot(row["bits"], row["rms"], markers[row["format"]], color=f"C{index}", alpha=0.8)
        for rounding, style in (("numbers", "o"), ("logarithms", "x")):
            some = [row for row in mine if row["format"].startswith("LogFMT") and row["rounded_as"] == rounding]
            right.errorbar([row["bits"] + 0.1 * index for row in some], [row["bias"] for row in some],
                           [2 * row["bias_noise"] for row in some], fmt=style, color=f"C{index}", alpha=0.8)
    for name, marker in markers.items():
        left.plot([], [], marker, color="gray", label=name)
    right.plot([], [], "o", color="gray", label="rounded as numbers")
    right.plot([], [], "x", color="gray", label="rounded as logarithms")
    right.axhline(0, color="gray", linewidth=0.8)
    left.set(yscale="log", xlabel="bits a number", ylabel="relative RMS error", title="lines: LogFMT")
    right.set(xlabel="bits a number", ylabel="relative bias of magnitudes", title="bars: 2 standard errors")
    right.set_yscale("symlog", linthresh=1e-5)
    left.legend()
    right.legend()
    return figure


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for option, given in (("--bits", arguments.bits), ("--cost-bits", arguments.cost_bits)):
        if not set(given) <= set(range(4, 17)):
            raise ConfigError(f"{option} ({' '.join(map(str, given))}): LogFMT has from 4 to 16 bits")
    if arguments.tiles < 1:
        raise ConfigError(f"--tiles ({arguments.tiles}) must be at least 1")
    with standard_output_for_json(arguments.json) as write_json:
        rows = [row for data in datasets(arguments) for row in errors(data, arguments.bits)]
        result = {"about": provenance(), "errors": rows, "costs": costs(arguments) if arguments.cost_rows else []}
        write_report(arguments.out, result, as_markdown(result), lambda: draw(rows))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
