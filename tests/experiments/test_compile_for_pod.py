"""The script that compiles for pods: its errors, and (slow) the layouts shipped for the real thing.

What it reports is tested in tests/dsv3_jax/codesign/test_aot.py.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.codesign.step_flops import flops_by_cause
from dsv3_jax.presets import LAYOUTS, RUNS

ROOT = Path(__file__).parents[2]
GIB = 2 ** 30


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "experiments/compile_for_pod.py", *arguments], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--pod", "h900:2x8"], "hardware h900 is unknown; did you mean h"),
    (["--preset", "deepseek_v3"], "has no pod of its own: name one, such as --pod h800:256x8"),
    (["--preset", "deepseek_v3", "--pod", "h800:256x8", "--mesh.scale-up", "16"],
     "does not fit inside one fast domain"),
    (["--pod", "mine:2x8", "--hardware", "no_such.toml"], "no_such.toml: cannot be read"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (["--preset", "deepseek_v3", "--pod", "h800:256x8", "--mesh.scale-out", "16", "--mesh.scale-up", "8"],
         "model.n_group (8) must be divisible by mesh.scale_out (16)"),
        (["--preset", "deepseek_v3", "--pod", "h800:256x8"],
         "must be divisible by the 2048 devices that share a batch"),
        (["--preset", "tinny", "--pod", "h100:2x4"], "did you mean tiny?")])])
def test_mistakes_are_told_in_one_line_before_compiling(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def processor_seconds() -> float:
    """That processes which this one started, and which ended, have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "minutes"), [("deepseek_v3_h800", 15), ("deepseek_v3_v5p_dual", 30),
                                                 ("deepseek_v3_tpu7x", 60)])
def test_deepseek_v3_fits_the_pod_its_layout_is_for(preset, minutes):
    # The others would take as long as these together, and are compiled in experiments/results/pods.
    assert set(LAYOUTS) == {"deepseek_v3_h800", "deepseek_v3_v5p_dual", "deepseek_v3_tpu7x", "deepseek_v3_v5p",
                            "deepseek_v3_h800_pipelined", "deepseek_v3_h800_dual"}
    before = processor_seconds()
    done = run("--preset", preset, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"]
    assert told["sequences"] * told["sequence_length"] == 15360 * 4096
    # Of the processor: how long it took depends on what else runs here.
    assert processor_seconds() - before < 60 * minutes
    assert told["host_peak_bytes"] < (12 if RUNS[preset].mesh.dual else 8) * GIB
    assert told["counted_once"] == []
    causes = told["flops_per_token_by_cause"]
    calculated = flops_by_cause(RUNS[preset])
    assert {name: causes[name] for name in calculated} == pytest.approx(calculated, rel=1e-6)
    assert abs(causes["other"]) < 0.02 * causes["model"]
    if RUNS[preset].mesh.dual:
        exchanges = [each for each in told["collectives"] if each["kind"] == "all-to-all"]
        sent, beside = (sum(each[key] for each in exchanges) for key in ("bytes", "overlapped_bytes"))
        assert beside > 0.95 * sent
