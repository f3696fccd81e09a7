"""LogFMT-nBit, the logarithmic format that paper 1 tried for the combine (section 3.2): error, bias, and cost.

  python experiments/logfmt.py
  python experiments/logfmt.py --run runs/quickstart --out experiments/results/logfmt

- Error against bits, beside E4M3 and E5M2 with a scale a tile of 1x128, E5M6 and BF16: for Gaussian numbers, heavy
  tails (Student's t, 3 degrees of freedom) and, with --run, the outputs of a trained model's routed experts on text
  held out, computed in float32.
- Bias: the sum of the errors of magnitudes over the sum of magnitudes, with its standard error over tiles, when numbers
  are rounded as numbers, as the format says, and when their logarithms are.
- Cost: the time of encoding and decoding the bf16 outputs of a paper-size layer on the device at hand, beside the time
  that the bytes saved would take on a link. The floor is what reads and writes alone take.

What the format costs in training loss is not measured here.
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
from experiments.command_line import finish, provenance, standard_output_for_json
from experiments.inference_options import FolderOptions, load_for_inference
from pallas_kernels.logfmt.reference import Ends, step_of
from pallas_kernels.quantise.reference import spread, tile_scales

TILE = ROW[1]
E5M2_MAX = 57344.0
LINKS = {"InfiniBand, 50 GB/s": 50e9, "NVLink of an H800, 160 GB/s": 160e9, "the same, 200 GB/s": 200e9}
"""Bytes/s one way: 400 Gbit/s; what is reached of NVLink, and its nominal rate (paper 1, section 4.1)."""


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
    return [*logs, Format("E4M3", 8 + 32 / TILE, lambda x: Quantised.of(x, ROW).dequantise()),
            Format("E5M2", 8 + 32 / TILE, rounded_to_e5m2),
            Format("E5M6", 12 + 32 / TILE, lambda x: QuantisedE5M6.of(x).dequantise()),
            Format("BF16", 16, lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))]


def rounded_to_logfmt(x: jax.Array, bits: int) -> jax.Array:
    """Encoded and decoded."""
    return LogFMT.of(x, bits).dequantise()


def rounded_to_e5m2(x: jax.Array) -> jax.Array:
    """The largest magnitude of a tile of 1x128 becomes E5M2's largest."""
    scales, inverses = tile_scales(x, ROW, False, E5M2_MAX)
    return (x * spread(inverses, ROW, x.shape)).astype(jnp.float8_e5m2).astype(jnp.float32) * spread(
        scales, ROW, x.shape)


def rounded_in_logarithms(x: jax.Array, bits: int) -> jax.Array:
    """LogFMT but for the rounding: to the code whose logarithm is nearest. Below the range it is the same."""
    held = LogFMT.of(x, bits)
    smallest, largest = (spread(end, ROW, x.shape) for end in jnp.split(held.ends, 2, axis=-1))
    step = step_of(Ends(smallest, largest), bits)
    down = jnp.round(jnp.log2(largest / jnp.maximum(jnp.abs(x), smallest)) / step)
    return jnp.where(jnp.abs(x) >= smallest, jnp.sign(x) * largest * jnp.exp2(-step * down), held.dequantise())


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
        return routed_outputs(nnx.merge(structure, gather_for_compute(params), router_bias), tokens_BT)
    with jax.set_mesh(loaded.mesh):
        outputs = run(loaded.params, loaded.router_bias, np.asarray(tokens[:rows * length], np.int32).reshape(rows, -1))
    for name, values in zip(("an expert's output", "sum over a token's experts"), outputs, strict=True):
        yield Data(name, np.asarray(values).reshape(-1, width))


def routed_outputs(model: DeepSeekV3, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [L, B, T, D] of the MoE layers: of each token's first expert, without its weight, and what its experts
    add to it together."""
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
    return jax.lax.scan(layer, hidden_BTD, layers)[1]


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
    tries = [(*each, "numbers") for each in formats(bits)]
    tries += [(f"LogFMT-{n}", n + 32 / TILE, functools.partial(rounded_in_logarithms, bits=n), "logarithms")
              for n in bits]
    return [{"data": data.name, "numbers": data.values_MK.size, "format": name, "bits": size, "rounding": rounding,
             **error_of(np.asarray(jax.jit(rounded)(data.values_MK)), data.values_MK)._asdict()}
            for name, size, rounded, rounding in tries]


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
    lines = ["# LogFMT: error, bias and cost", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
             "Rounded as numbers or, as the format does not, as logarithms. Bias is that of magnitudes, with its "
             "standard error.", "",
             "| data | format | bits a number | rounded as | RMS error | bias | +- | became zero |",
             "|---|---|---:|---|---:|---:|---:|---:|"]
    lines += [f"| {row['data']} | {row['format']} | {row['bits']:g} | {row['rounding']} | {row['rms']:.3e} | "
              f"{row['bias']:+.2e} | {row['bias_noise']:.1e} | {row['to_zero']:.2%} |" for row in result["errors"]]
    if result["costs"]:
        first = result["costs"][0]
        lines += ["", f"Encoding and decoding [{first['rows']}, {first['width']}] in bf16; in brackets, as a multiple "
                  "of the time that the bytes saved take on the link. Floor: bytes over memory bandwidth. Copies here: "
                  f"{first['copy_rate'] / 1e9:,.0f} GB/s.", "",
                  "| bits | bytes saved | both | floor here | floor on an H800 | "
                  + " | ".join(f"saved on {name}" for name in LINKS) + " |", "|---:|---:|---:|---:|---:|"
                  + "---:|" * len(LINKS)]
    for row in result["costs"]:
        floor = "" if row["floor_here"] is None else f"{row['floor_here'] * 1e6:,.0f} us"
        links = [f"{saved * 1e6:,.0f} us ({row['seconds'] / saved:.2f}x)" for saved in row["transfer_saved"].values()]
        lines.append(f"| {row['bits']} | {row['bytes_saved']:,} | {row['seconds'] * 1e6:,.0f} us | {floor} | "
                     f"{row['floor_h800'] * 1e6:,.0f} us | " + " | ".join(links) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> Any:
    """The figure: error against bits, and bias against bits with both roundings."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "dsv3-jax[quickstart]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    markers = {"E4M3": "o", "E5M2": "s", "E5M6": "D", "BF16": "^"}
    for index, name in enumerate(dict.fromkeys(row["data"] for row in rows)):
        mine = [row for row in rows if row["data"] == name]
        logs = [row for row in mine if row["format"].startswith("LogFMT") and row["rounding"] == "numbers"]
        left.plot([row["bits"] for row in logs], [row["rms"] for row in logs], ".-", color=f"C{index}", label=name)
        for row in mine:
            if row["format"] in markers:
                left.plot(row["bits"], row["rms"], markers[row["format"]], color=f"C{index}", alpha=0.8)
        for rounding, style in (("numbers", "o"), ("logarithms", "x")):
            some = [row for row in mine if row["format"].startswith("LogFMT") and row["rounding"] == rounding]
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
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
            arguments.out.with_suffix(".md").write_text(as_markdown(result))
            draw(rows).savefig(arguments.out.with_suffix(".png"), dpi=110)
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
