"""The benchmark without an accelerator, and its measuring parts on CPU, where the numbers mean nothing."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ConfigError
from experiments import bench_kernels
from experiments.bench_kernels import Arguments
from pallas_kernels import tuning
from pallas_kernels.benchmark.cases import product, published_cases, small_cases
from pallas_kernels.benchmark.timing import Timer, Timing, measured_peaks
from pallas_kernels.benchmark.torch_rival import Torch
from pallas_kernels.quantise import gpu

ROOT = Path(__file__).parents[2]
HAVE_COMPILERS = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda13_plugin"))


def test_without_accelerator():
    """A process of its own, since a process compiles a Hopper kernel only once."""
    done = subprocess.run([sys.executable, "experiments/bench_kernels.py", "--operations", "quantise", "--json"],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "no accelerator here" in done.stderr
    result = json.loads(done.stdout)
    assert [(row["backend"], row["correct"], row["error"]) for row in result["interpretations"]] == [
        ("hopper", True, 0), ("tpu", True, 0)]
    assert [row["bound_by"] for row in result["rows"]] == ["bytes", "bytes"]
    if HAVE_COMPILERS:
        assert [row["target"] for row in result["compilations"]] == ["h100", "h100", "v5p", "v6e", "tpu7x"]
        assert all(row["kernels"] == 1 and not row["problem"] for row in result["compilations"])
        assert [row["spilled_bytes"] for row in result["compilations"][:2]] == [0, 0]
    else:
        assert result["not_compiled"]


def test_floors_are_those_of_the_datasheet():
    """Published peaks of an H100: 1978.9 TFLOP/s and 3.35 TB/s."""
    m, n, k = 4096, 4096, 7168
    row = bench_kernels.predict(product(m, n, k))
    assert row["flops"] == 2 * m * n * k
    assert row["bytes"] == m * k + n * k + 4 * (m * k // 128 + n * k // 128 ** 2) + 2 * m * n
    assert row["bound_by"] == "FLOPs"
    assert row["floor_microseconds"]["h100"] == pytest.approx(121.54, abs=0.01)
    assert row["floor_microseconds"]["v5p"] == pytest.approx(1e6 * row["flops"] / 459e12)  # in bfloat16
    assert row["expected_microseconds"] > row["floor_microseconds"]["h100"]
    one = bench_kernels.predict(product(1, n, k))
    assert one["bound_by"] == "bytes"
    assert one["floor_microseconds"]["h100"] == pytest.approx(1e6 * one["bytes"] / 3.35e12)


def test_every_published_shape_is_there_with_its_rivals():
    """Rivals compute as many numbers as the kernel; the oracle, the same shapes."""
    cases = published_cases()
    assert len(cases) == 7 * 4 + 7 + 3 * 2 + 4 * 2 + 5 + 2 + 1
    for case in cases:
        shapes = jax.eval_shape(functools.partial(case.run, backend="reference"), *case.operands)
        oracle = jax.eval_shape(case.oracle, *case.operands)
        assert jax.tree.map(jnp.shape, oracle) == jax.tree.map(jnp.shape, shapes), case
        assert case.rivals, case
        for ways in case.rivals.values():
            for rival in ways:
                other = jax.eval_shape(rival.run, *jax.eval_shape(rival.prepare, *case.operands))
                sizes = [[array.size for array in jax.tree.leaves(tree)] for tree in (shapes, other)]
                assert sizes[0] == sizes[1], case


@pytest.mark.parametrize("backend", ["hopper", "tpu"])
def test_every_small_shape_has_a_kernel(backend):
    cases = small_cases()
    assert cases
    for case in cases:
        # Raises where there is none.
        made, expected = (jax.eval_shape(functools.partial(case.run, backend=name), *case.operands)
                          for name in (backend, "reference"))
        assert made == expected, case


def test_a_wrong_kernel_is_told_and_the_status_is_not_zero(monkeypatch, capsys):
    def wrong(x, tile, power_of_two):
        values, scales = right(x, tile, power_of_two)
        return values, scales.at[0, 0].multiply(2)
    right = gpu.quantise
    monkeypatch.setattr(gpu, "quantise", wrong)
    monkeypatch.setattr(bench_kernels.runtime, "start", lambda mesh: None)
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--operations", "quantise", "--compile", "none"])
    with pytest.raises(SystemExit, match="1"):
        bench_kernels.main()
    assert "- quantise M=160 K=256: WRONG: 3.1e-03 > 0" in capsys.readouterr().out


def test_what_is_not_compiled_is_told(monkeypatch):
    def no_compiler(target, function, operands):
        if target != "h100":
            raise ImportError("needs pip install")
        raise jax.errors.JaxRuntimeError("no registers left\nand more")
    monkeypatch.setattr(bench_kernels, "compile_kernel", no_compiler)
    rows, missing = bench_kernels.compile_cases("all", published_cases(("quantise",)))
    assert [row["problem"] for row in rows] == 2 * ["JaxRuntimeError: no registers left"]
    assert list(missing) == ["v5p", "v6e", "tpu7x"]


@pytest.mark.parametrize(("arguments", "message"), [
    (Arguments(operations=("fp8_matmul",), rows=(5,)), "--rows 5: no shape .* there are 1, 64, 128, 4096"),
    (Arguments(tune=True), "--tune times the kernels of a Hopper card, and this is cpu")])
def test_mistakes_are_told(arguments, message):
    with pytest.raises(ConfigError, match=message):
        bench_kernels.run(arguments)


def test_measures_as_on_a_device(monkeypatch):
    """The plain JAX backend stands for a kernel."""
    monkeypatch.setattr(bench_kernels, "measured_peaks", functools.partial(measured_peaks, size=256, copied=2 ** 22))
    monkeypatch.setattr(bench_kernels, "find_torch", lambda: Torch(None, "torch is not installed"))
    cases = small_cases(("fp8_matmul", "swiglu_quantise"))
    result = bench_kernels.on_device(Arguments(), "reference", cases, Timer(2 ** 16, calls=2, repeats=3))
    result = {"about": bench_kernels.about(), **json.loads(json.dumps(result))}
    matmul, cast = result["rows"]
    assert matmul["correct"]
    assert cast["correct"]
    assert set(matmul["baselines"]) == {"xla_bf16", "xla_fp8"}
    assert set(cast["baselines"]) == {"xla_plain"}
    for baseline in matmul["baselines"].values():
        assert baseline["times"] == baseline["microseconds"] / matmul["microseconds"]
    text = bench_kernels.as_markdown(result)
    assert "| fp8_matmul | M=72 N=192 K=256 | correct" in text
    assert "Nothing is wrong." in text


def test_a_kernel_that_fails_is_one_wrong_line():
    case, = small_cases(("quantise",))

    def fails(*operands, backend):
        if backend == "hopper":
            raise NotImplementedError("no such layout\nand more")
        return case.run(*operands, backend=backend)
    row = bench_kernels.measure(dataclasses.replace(case, run=fails), "hopper", None, None, True, Torch(None, ""))
    assert (row["correct"], row["problem"]) == (False, "NotImplementedError: no such layout")
    assert bench_kernels.failures({"accelerator": True, "rows": [row]}) == [
        "quantise M=160 K=256: WRONG: NotImplementedError: no such layout"]


def test_tuning_keeps_the_fastest_right_tile(monkeypatch, tmp_path):
    """The smallest tile is the fastest here, but wrong; next are (128, 64) and (64, 128)."""
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    tuning.TABLE.write_text("{}")
    monkeypatch.setattr(bench_kernels, "checked", lambda *_, **__: {
        "correct": tuning._only != {"product": (64, 64)}, "error": 0., "limit": 0., "problem": ""})

    class Timer:
        def __call__(self, run, *operands):
            rows, columns = tuning._only["product"]
            return Timing(1e-6 * rows * columns, 0., False)
    result = bench_kernels.tune(small_cases(("fp8_matmul", "quantise")), Timer())
    assert len(result["rows"]) == len(tuning.CANDIDATES["product"])
    assert tuning.measurements("cpu") == {tuning.Key("product", 72, 192, 256): (128, 64)}
