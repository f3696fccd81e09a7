"""Whether each kernel is right on this device, how long it takes, and what else could do the same.

  python experiments/bench_kernels.py --out experiments/results/bench_kernels
  python experiments/bench_kernels.py --operations fp8_matmul --rows 4096 --no-baselines
  python experiments/bench_kernels.py --operations fp8_matmul fp8_wgrad --tune

On a Hopper card or a TPU, for every shape: the result against plain JAX in float32, on dequantised operands, by
DeepGEMM's metric (casts: to the bit); the median time of a call with L2 flushed, without warming up; its rates; how
many times faster it is than XLA in bfloat16 (of a cast, than XLA's compilation of plain JAX), XLA in float8 with a
scale for each tensor, and torch's scaled matmul where torch with CUDA is installed; and its share of the fastest that
this device reached in the same run. A rate is of the least work: operands read once, results written once. A time that
does not stand out of the noise has a question mark. --tune times every tile of the Hopper float8 kernels instead, and
adds the fastest to pallas_kernels/tuned.json, where the kernels find them.

Without an accelerator it says so, interprets every kernel on a small shape, compiles for H100, v5p, v6e and Ironwood
(needs the extra `aot`), and prints the floor of each shape and the time expected on an H100. Takes about four minutes
on two cores; --compile all takes six more.

The exit status is 1 if a kernel is wrong, does not compile or spills registers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.codesign.kernels import compile_kernel
from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, standard_output_for_json, write_report
from pallas_kernels import hopper, tuning
from pallas_kernels.benchmark.case import OPERATIONS, Case, OperationName
from pallas_kernels.benchmark.cases import published_cases, small_cases
from pallas_kernels.benchmark.checking import check, check_oracle
from pallas_kernels.benchmark.interpretation import interpreted
from pallas_kernels.benchmark.rivals import Rival, of_product
from pallas_kernels.benchmark.timing import Peaks, Timer, Timing, fastest, first_line, measured_peaks
from pallas_kernels.benchmark.torch_rival import Torch, find_torch, time_product
from pallas_kernels.targets import Backend, nvidia_is_hopper

TARGETS = ("h100", "v5p", "v6e", "tpu7x")
H100 = HARDWARE["h100"]
H100_CLOCK = H100.peak_flops["fp8"] / (hopper.MULTIPROCESSORS * tuning.FLOPS_PER_CLOCK)
"""Hz: at 1.83 GHz the tensor cores reach the datasheet's rate. Under load a card may run slower."""
COPY_SHARE = 0.9
"""Of nominal memory bandwidth, what a kernel is expected to reach: a guess, until a card says."""
VERSIONS = ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "torch")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    operations: tuple[OperationName, ...] = OPERATIONS
    rows: tuple[int, ...] = ()
    """Only shapes with one of these numbers of rows (or tokens); default all."""
    baselines: bool = True
    """Also time what else could do it."""
    tune: bool = False
    """Time every tile of the Hopper float8 kernels and keep the fastest."""
    compile: Literal["none", "few", "all"] = "few"
    """Without an accelerator. few: every shape for the H100, and for each TPU one of each operation."""
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    json: bool = False
    """Print one JSON object to standard output, everything else to standard error."""


def say(line: str) -> None:
    """Progress, which is no part of the result."""
    print(line, file=sys.stderr, flush=True)


def kernels_here() -> Backend | None:
    """The backend of this machine's accelerator; None without one.

    Raises:
      ConfigError: an accelerator that there are no kernels for.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        return None
    if platform == "tpu":
        return "tpu"
    if nvidia_is_hopper():
        return "hopper"
    raise ConfigError(f"device ({jax.devices()[0].device_kind}): the kernels are for Hopper cards and TPUs; "
                      "JAX_PLATFORMS=cpu checks them without it")


def chosen_cases(arguments: Arguments) -> list[Case]:
    """What the arguments ask for.

    Raises:
      ConfigError: no shape is that.
    """
    cases = published_cases(arguments.operations, arguments.rows)
    if not cases:
        known = sorted({case.rows for case in published_cases(arguments.operations)})
        raise ConfigError(f"--rows {' '.join(map(str, arguments.rows))}: no shape of --operations "
                          f"{' '.join(arguments.operations)} has these; there are {', '.join(map(str, known))}")
    return cases


# On a device.


def on_device(arguments: Arguments, backend: Backend, cases: Sequence[Case], timer: Timer) -> dict[str, Any]:
    """Checks and times every case; one line each as it comes."""
    oracle_error = check_oracle()
    of_float8 = of_product(jnp.bfloat16)
    peaks = measured_peaks(timer, tuple(functools.partial(_with_scales, rival.run) for rival in of_float8["xla_fp8"]),
                           of_float8["xla_bf16"][0].run)
    torch = find_torch() if arguments.baselines and backend == "hopper" else Torch(None, "not asked for")
    say(f"fastest here: {peaks.fp8_flops / 1e12:.0f} TFLOP/s float8, {peaks.bf16_flops / 1e12:.0f} bfloat16, "
        f"{peaks.bytes_per_second / 1e9:.0f} GB/s" + (f"; {torch.problem}" if torch.problem else ""))
    rows = []
    for case in cases:
        rows.append(measure(case, backend, timer, peaks, arguments.baselines, torch))
        say(_device_line(rows[-1]))
    return {"accelerator": True, "peaks": peaks._asdict(), "oracle_error": oracle_error, "torch": torch.problem,
            "rows": rows}


def _with_scales(run: Callable[..., Any], x: jax.Array, y: jax.Array) -> Any:
    return run(x, y, jnp.float32(0.5), jnp.float32(0.25))


def measure(case: Case, backend: Backend, timer: Timer, peaks: Peaks, baselines: bool, torch: Torch) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "flops": case.flops, "bytes": case.bytes}
    operands = jax.jit(case.draw)(jax.random.key(0))
    row |= checked(case, operands, backend, real=True)
    if row["problem"]:
        return row
    timing = timer(functools.partial(case.run, backend=backend), *operands)
    peak = peaks.fp8_flops if case.operand == "fp8" else peaks.bf16_flops
    row |= {"microseconds": 1e6 * timing.seconds, "spread_microseconds": 1e6 * timing.spread, "clear": timing.clear,
            "tflops": case.flops / timing.seconds / 1e12, "gb_per_second": case.bytes / timing.seconds / 1e9,
            "share_of_peak": case.floor_seconds(peak, peaks.bytes_per_second) / timing.seconds,
            "tile": _tile(case) if backend == "hopper" else None, "baselines": {}}
    if baselines:
        for name, ways in case.rivals.items():
            row["baselines"][name] = _fastest(timer, ways, operands)
        if torch.module is not None and case.torch_shape is not None:
            taken = time_product(torch.module, *case.torch_shape, timer.calls, timer.repeats)
            row["baselines"][f"torch_{taken.scales}" if taken.timing else "torch"] = {
                "microseconds": 1e6 * taken.timing.seconds if taken.timing else None, "problem": taken.problem}
        for baseline in row["baselines"].values():
            taken_there = baseline["microseconds"]
            baseline["times"] = taken_there / row["microseconds"] if taken_there else None
    return row


def _fastest(timer: Timer, ways: Sequence[Rival], operands: Sequence[jax.Array]) -> dict[str, Any]:
    def timed(rival: Rival) -> Timing:
        return timer(rival.run, *jax.jit(rival.prepare)(*operands))
    try:
        return {"microseconds": 1e6 * fastest([functools.partial(timed, rival) for rival in ways]).seconds,
                "problem": ""}
    except RuntimeError as error:
        return {"microseconds": None, "problem": str(error)}


def checked(case: Case, operands: tuple[jax.Array, ...], backend: Backend, real: bool) -> dict[str, Any]:
    """Whether it is right, and how far off; a kernel that does not run is wrong, and says why."""
    try:
        found = check(case, operands, backend, real)
    except Exception as error:  # the others are measured all the same
        return {"correct": False, "error": None, "limit": None, "problem": first_line(error)}
    if math.isnan(found.error):
        return {"correct": False, "error": None, "limit": found.limit, "problem": "the result has NaN"}
    return {"correct": found.correct, "error": found.error, "limit": found.limit, "problem": ""}


def _tile(case: Case) -> str | None:
    return f"{case.tile.rows}x{case.tile.columns}" if case.tile else None


def tune(cases: Sequence[Case], timer: Timer) -> dict[str, Any]:
    """Times every tile of every case and keeps the fastest right one of each."""
    device, rows = jax.devices()[0].device_kind, []
    for case in cases:
        if case.key is None or case.operand != "fp8":
            continue
        operands = jax.jit(case.draw)(jax.random.key(0))
        times = {}
        for tile in tuning.candidates_for(case.key, case.whole_tiles):
            with tuning.only(case.key.operation, tile):
                row = checked(case, operands, "hopper", real=True)
                if row["correct"]:
                    times[tile] = timer(functools.partial(case.run, backend="hopper"), *operands).seconds
            rows.append({"operation": case.operation, "shape": case.shape, "tile": f"{tile[0]}x{tile[1]}", **row,
                         "microseconds": 1e6 * times[tile] if tile in times else None})
            say(_tuned_line(rows[-1]))
        if times:
            tuning.remember(device, {case.key: min(times, key=lambda tile: times[tile])})
    say(f"written to {tuning.TABLE}")
    return {"accelerator": True, "tuned": True, "rows": rows}


# Without one.


def without_accelerator(arguments: Arguments, cases: Sequence[Case]) -> dict[str, Any]:
    """Interprets, compiles and predicts."""
    say(f"no accelerator here, JAX runs on {jax.default_backend()}: kernels are interpreted on small shapes and "
        "compiled, and nothing is timed")
    interpretations = interpret(arguments.operations)
    compilations, missing = compile_cases(arguments.compile, cases)
    return {"accelerator": False, "interpretations": interpretations, "compilations": compilations,
            "not_compiled": missing, "h100_clock_ghz": H100_CLOCK / 1e9, "copy_share": COPY_SHARE,
            "rows": [predict(case) for case in cases]}


def interpret(operations: Sequence[OperationName]) -> list[dict[str, Any]]:
    """Every operation's kernels on a small shape; an interpreter that finds a race raises, which counts as wrong."""
    cases = small_cases(operations)
    operands, rows = [jax.jit(case.draw)(jax.random.key(0)) for case in cases], []
    backends: tuple[Backend, ...] = ("hopper", "tpu")
    for backend in backends:
        with interpreted(backend):
            for case, drawn in zip(cases, operands, strict=True):
                rows.append({"operation": case.operation, "shape": case.shape, "backend": backend,
                             **checked(case, drawn, backend, real=False)})
                say(f"interpreted {case.operation} {case.shape} for {backend}: {_verdict(rows[-1])}")
    return rows


def compile_cases(how_many: str, cases: Sequence[Case]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(what each compiler made of each case, why there is nothing of a target)."""
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    first_of_each = {case.operation: case for case in reversed(cases)}.values()
    for target in TARGETS if how_many != "none" else ():
        for case in cases if how_many == "all" or target == "h100" else first_of_each:
            row: dict[str, Any] = {"target": target, "operation": case.operation, "shape": case.shape, "problem": ""}
            try:
                made = compile_kernel(target, case.run, case.operands)
            except ImportError as error:
                missing[target] = str(error)
                say(f"not compiled for {target}: {error}")
                break
            except Exception as error:  # the others are compiled all the same
                row["problem"] = first_line(error)
            else:
                row |= made._asdict()
                if not made.kernels:
                    row["problem"] = "no kernel in the program"
                elif made.spilled_bytes:
                    row["problem"] = f"{made.spilled_bytes} bytes of registers spilled"
                elif made.waits_for_each_wgmma:
                    row["problem"] = "ptxas runs wgmma one at a time"
            rows.append(row)
            say(f"compiled {case.operation} {case.shape} for {target}: {row['problem'] or _made(row)}")
    return rows, missing


def _made(row: dict[str, Any]) -> str:
    spills = "" if row["spilled_bytes"] is None else f", {row['spilled_bytes']} bytes spilled"
    return f"{row['seconds']:.1f} s{spills}"


def predict(case: Case) -> dict[str, Any]:
    """Floors at nominal rates, and what to expect of an H100."""
    def floor(name: str) -> float:
        kind = HARDWARE[name]
        return case.floor_seconds(kind.peak_flops.get(case.operand, kind.peak_flops["bf16"]), kind.hbm_bandwidth)
    clocks, rate = case.predicted_clocks, H100.peak_flops[case.operand]
    expected = max((clocks or 0) / H100_CLOCK, case.flops / rate, case.bytes / (COPY_SHARE * H100.hbm_bandwidth))
    return {"operation": case.operation, "shape": case.shape, "flops": case.flops, "bytes": case.bytes,
            "floor_microseconds": {name: 1e6 * floor(name) for name in TARGETS},
            "bound_by": "FLOPs" if case.flops / rate > case.bytes / H100.hbm_bandwidth else "bytes",
            "tile": _tile(case), "expected_microseconds": 1e6 * expected,
            "expected_tflops": case.flops / expected / 1e12, "expected_share_of_floor": floor("h100") / expected}


# The report.


def failures(result: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    wrong = [f"{row['operation']} {row['shape']}: {_verdict(row)}"
             for row in (*result.get("interpretations", ()), *(result["rows"] if result["accelerator"] else ()))
             if not row["correct"]]
    return wrong + [f"{row['operation']} {row['shape']} for {row['target']}: {row['problem']}"
                    for row in result.get("compilations", ()) if row["problem"]]


def _verdict(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"WRONG: {row['problem']}"
    return f"correct ({row['error']:.1e})" if row["correct"] else f"WRONG: {row['error']:.1e} > {row['limit']:g}"


def _times(row: dict[str, Any], prefix: str) -> str:
    """How many times faster than a baseline."""
    found = [baseline for name, baseline in row["baselines"].items() if name.startswith(prefix)]
    if not found:
        return ""
    return f"{found[0]['times']:.2f}x" if found[0]["times"] else "failed"


def _device_cells(row: dict[str, Any]) -> list[str]:
    head = [row["operation"], row["shape"], _verdict(row)]
    if row["problem"]:
        return head + 10 * [""]
    torch = "".join(name.removeprefix("torch_") for name in row["baselines"] if name.startswith("torch_"))
    return [*head, f"{row['microseconds']:.1f}{'' if row['clear'] else '?'} ± {row['spread_microseconds']:.1f}",
            f"{row['tflops']:.0f}", f"{row['gb_per_second']:.0f}", f"{row['share_of_peak']:.0%}", row["tile"] or "",
            _times(row, "xla_bf16"), _times(row, "xla_fp8"), _times(row, "xla_plain"), _times(row, "torch"), torch]


DEVICE_HEAD = ("operation", "shape", "correct?", "µs", "TFLOP/s", "GB/s", "of the fastest here", "tile", "XLA bf16",
               "XLA fp8", "XLA, plain JAX", "torch", "torch's scales")


def _device_line(row: dict[str, Any]) -> str:
    cells = zip(DEVICE_HEAD[3:], _device_cells(row)[3:], strict=True)
    return f"{row['operation']} {row['shape']}: {_verdict(row)} " + " ".join(
        f"[{name} {cell}]" for name, cell in cells if cell)


def _tuned_line(row: dict[str, Any]) -> str:
    time = "" if row["microseconds"] is None else f" {row['microseconds']:.1f} µs"
    return f"{row['operation']} {row['shape']} {row['tile']}: {_verdict(row)}{time}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def as_markdown(result: dict[str, Any]) -> str:
    """What a person reads."""
    about = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = ["# Kernels", "", f"`{about['command']}`", "",
             f"{about['device']}; {about['driver']}jax {about['jax']}, {versions}, Python {about['python']}, "
             f"{about['date']}.", ""]
    if result.get("tuned"):
        lines += table(("operation", "shape", "tile", "correct?", "µs"), [
            (row["operation"], row["shape"], row["tile"], _verdict(row),
             "" if row["microseconds"] is None else f"{row['microseconds']:.1f}") for row in result["rows"]])
    elif result["accelerator"]:
        lines += _device_report(result)
    else:
        lines += _prediction_report(result)
    wrong = failures(result)
    lines += ["", *(["Wrong:", "", *(f"- {line}" for line in wrong)] if wrong else ["Nothing is wrong."])]
    return "\n".join(lines) + "\n"


def _device_report(result: dict[str, Any]) -> list[str]:
    peaks = result["peaks"]
    note = (f"Fastest here: XLA products of 8192 x 8192 x 8192 at {peaks['fp8_flops'] / 1e12:.0f} TFLOP/s in float8 "
            f"and {peaks['bf16_flops'] / 1e12:.0f} in bfloat16, and a pass over memory at "
            f"{peaks['bytes_per_second'] / 1e9:.0f} GB/s. Medians with half the distance of the quartiles, L2 flushed "
            "before each call; ? where a time is less than three times that or the host was as slow as the device. "
            "The last columns are how many times faster the kernel is.")
    return [note + (f" torch: {result['torch']}." if result["torch"] else ""), "",
            *table(DEVICE_HEAD, [_device_cells(row) for row in result["rows"]])]


def _prediction_report(result: dict[str, Any]) -> list[str]:
    lines = ["There is no accelerator: nothing here was timed.", "", "## Interpreted on CPU, small shapes", "",
             *table(("operation", "shape", "Hopper", "TPU"), _interpretation_cells(result["interpretations"])), "",
             "Error by DeepGEMM's metric against the dequantised operands' product; of casts, the share of bits that "
             "differ.", "", "## Compiled, and expected", ""]
    spills = [row["spilled_bytes"] for row in result["compilations"] if row.get("spilled_bytes") is not None]
    lines += [f"Not compiled for {target}: {reason}." for target, reason in result["not_compiled"].items()]
    if spills:
        lines += [f"{len(spills)} kernels compiled for the H100; {sum(spills)} bytes of registers spilled."]
    far = sorted((row for row in result["rows"] if row["flops"]), key=lambda row: row["expected_share_of_floor"])[:3]
    lines += ["Floors: the larger of FLOPs over peak and least bytes over bandwidth, of one JAX device, nominal rates. "
              f"Expected on an H100: the rule that tiles are chosen by, at {result['h100_clock_ghz']:.2f} GHz, or the "
              f"bytes at {result['copy_share']:.0%} of the bandwidth, whichever is longer; for attention, which has no "
              "such rule, no more than its FLOPs at the peak.",
              "Furthest from their floor, so first to be tuned: " + ", ".join(
                  f"{row['operation']} {row['shape']} ({row['expected_share_of_floor']:.0%})" for row in far) + "."
              if far else "No rule says more of casts than their bytes.", ""]
    return lines + table(("operation", "shape", "GFLOP", "MB", "H100 floor, µs", "bound by", "expected, µs", "TFLOP/s",
                          "tile", "bytes spilled", "v5p floor", "v6e floor", "TPU7x floor", "compiled for"),
                         [_prediction_cells(row, result["compilations"]) for row in result["rows"]])


def _interpretation_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    kinds = list(dict.fromkeys((row["operation"], row["shape"]) for row in rows))
    return [[*kind, *(_verdict(row) for row in rows if (row["operation"], row["shape"]) == kind)] for kind in kinds]


def _prediction_cells(row: dict[str, Any], compilations: Sequence[dict[str, Any]]) -> list[str]:
    mine = {made["target"]: made for made in compilations
            if (made["operation"], made["shape"]) == (row["operation"], row["shape"])}
    spilled = mine["h100"].get("spilled_bytes") if "h100" in mine else None
    floors = row["floor_microseconds"]
    return [row["operation"], row["shape"], f"{row['flops'] / 1e9:.1f}", f"{row['bytes'] / 1e6:.1f}",
            f"{floors['h100']:.1f}", row["bound_by"], f"{row['expected_microseconds']:.1f}",
            f"{row['expected_tflops']:.0f}" if row["flops"] else "", row["tile"] or "",
            "" if spilled is None else str(spilled), *(f"{floors[name]:.1f}" for name in TARGETS[1:]),
            " ".join(target for target, made in mine.items() if not made["problem"])]


def about() -> dict[str, Any]:
    """Command, device, driver and versions."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = Path("/proc/driver/nvidia/version")
    told = driver.read_text().splitlines()[0].split(":", 1)[-1].strip() + "; " if driver.exists() else ""
    return {**provenance(), "driver": told, "versions": versions}


def run(arguments: Arguments, timer: Callable[[], Timer] = Timer) -> dict[str, Any]:
    """Whatever this machine allows."""
    backend, cases = kernels_here(), chosen_cases(arguments)
    if arguments.tune and backend != "hopper":
        raise ConfigError(f"--tune times the kernels of a Hopper card, and this is {jax.devices()[0].device_kind}: run "
                          "it where there is one")
    if backend is None:
        return {"about": about(), **without_accelerator(arguments, cases)}
    return {"about": about(), **(tune(cases, timer()) if arguments.tune else
                                 on_device(arguments, backend, cases, timer()))}


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        runtime.start(MeshConfig(data=1))
        result = run(arguments)
        write_report(arguments.out, result, as_markdown(result))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")
    if failures(result):
        sys.exit(1)


if __name__ == "__main__":
    finish(main)
