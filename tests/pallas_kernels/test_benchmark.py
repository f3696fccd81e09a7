"""What the benchmark is made of: clocks, rivals, and the table of tiles."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dsv3_jax.codesign.pods import parse_pod, pod_devices
from pallas_kernels import tuning
from pallas_kernels.benchmark import checking, timing, torch_rival
from pallas_kernels.benchmark.cases import product
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.tuning import Key
from tests.pallas_kernels import fp8_cases

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
    return now


def test_a_call_takes_what_a_step_takes_more(clock):
    """A step costs the host 1 and the device 5 or, with the call, 7; waiting takes what the host has not."""
    def step(device: float) -> None:
        clock.seconds += 1
        clock.busy = max(getattr(clock, "busy", 0), clock.seconds) + device - 1

    def wait(_) -> None:
        clock.seconds = max(clock.seconds, clock.busy)
    found = timing.paired(lambda: step(5), lambda: step(7), wait, calls=4, repeats=3)
    assert found.seconds == pytest.approx(2, abs=0.5)
    assert found.spread == pytest.approx(0, abs=1e-9)
    assert found.clear


def test_a_slow_host_is_told(clock):
    def step(host: float) -> None:
        clock.seconds += host
    found = timing.paired(lambda: step(5), lambda: step(7), lambda _: None, calls=4, repeats=3)
    assert found.seconds == 2
    assert found.host_bound
    assert not found.clear


def test_times_a_product():
    x = jnp.ones((768, 768))
    found = timing.Timer(2 ** 16, calls=2, repeats=5)(lambda x, y: x @ y, x, x)
    assert math.isfinite(found.seconds)
    assert found.seconds > 0
    assert found.spread >= 0


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_a_card_flushes_then_runs_the_kernel():
    """In the order of the compiled schedule, with nothing copied."""
    device = pod_devices(parse_pod("h100:1x1"))[0]
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device))
              for a in (jax.ShapeDtypeStruct((2 ** 26,), jnp.float32), *product(4096, 576, 7168).operands)]
    step = jax.jit(functools.partial(timing.flush_and_run, fp8_matmul), donate_argnums=0)
    compiled = step.lower(*placed).compile()
    text = compiled.as_text()
    entry = text[text.index("ENTRY"):]
    assert "is_scheduled=true" in text
    assert entry.index("= f32[67108864]{0} fusion(") < entry.index('custom_call_target="mosaic_gpu')
    assert " copy(" not in entry
    assert compiled.memory_analysis().temp_size_in_bytes < 2 ** 20


def test_the_metric_is_that_of_the_tests():
    rng = np.random.default_rng(0)
    want = rng.normal(size=(64, 64)).astype(np.float32)
    for noise in (1e-1, 1e-3, 1e-5):
        got = want + noise * rng.normal(size=want.shape).astype(np.float32)
        expected = fp8_cases.difference(got, want.astype(np.float64))
        assert float(checking.difference(jnp.asarray(got), jnp.asarray(want))) == pytest.approx(expected, rel=1e-3)
    assert checking.difference(jnp.zeros(3), jnp.zeros(3)) == 0
    assert not checking.Check(float("nan"), 1.).correct


def test_the_limits_tell_one_wrong_scale_from_rounding():
    case = product(128, 128, 256)
    x, x_scales, w, w_scales = jax.jit(case.draw)(jax.random.key(0))

    def run(x, x_scales, w, w_scales, backend=None):
        return fp8_matmul(x, x_scales.at[5, 1].multiply(2), w, w_scales, backend="reference")
    wrong, operands = dataclasses.replace(case, run=run), (x, x_scales, w, w_scales)
    assert checking.check(case, operands, "reference", real=False).correct
    assert not checking.check(wrong, operands, "reference", real=False).correct


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    tuning.TABLE.write_text("{}")


def chosen(*shape: int, **options) -> tuple[int, int] | None:
    tile = tuning.tile_for("product", *shape, **options)
    return tile and (tile.rows, tile.columns)


def test_a_measured_tile_is_chosen(table):
    shape, other = (4096, 4096, 7168), (4096, 7168, 2048)
    by_rule = chosen(*shape)
    assert by_rule != (64, 64)
    tuning.remember(H100, {Key("product", *shape): (64, 64)})
    tuning.remember(H100, {Key("product", *other): (64, 128)})
    tuning.remember("another card", {Key("product", 1, 64, 128): (64, 64)})
    assert chosen(*shape) == (64, 64)
    assert chosen(*other) == (64, 128)
    assert chosen(8192, 4096, 7168) == by_rule
    tuning.remember(H100, {Key("product", *shape): (128, 64)})
    assert chosen(*shape) == (128, 64)
    written = json.loads(tuning.TABLE.read_text())
    assert len(written[H100]) == 2
    assert written[H100][0] == {"operation": "product", "rows": 4096, "columns": 4096, "terms": 7168, "groups": 1,
                                "tile": [128, 64]}


def test_a_measured_tile_that_does_not_fit_is_not_chosen(table):
    tuning.remember(H100, {Key("product", 576, 192, 256): (128, 128)})
    assert chosen(576, 192, 256) == (128, 128)
    assert chosen(576, 192, 256, whole=True) == (64, 64)
    tuning.remember(H100, {Key("product", 64, 64, 256): (1, 1)})
    assert chosen(64, 64, 256) in tuning.CANDIDATES["product"]


def test_the_table_that_is_shipped_can_be_read():
    assert isinstance(json.loads(tuning.TABLE.read_text()), dict)
    assert tuning.measurements("no such card") == {}


def test_only_makes_kernels_of_one_tile():
    """Of one shape, which JAX would not trace twice. (All tiles are compiled in test_fp8_compiled.py.)"""
    operands, programs = product(512, 768, 768).operands, set()
    tiles = tuning.CANDIDATES["product"][:3]
    for tile in tiles:
        with tuning.only("product", tile):
            assert chosen(512, 768, 768) == tile
            lowered = jax.jit(fp8_matmul).trace(*operands).lower(lowering_platforms=("cuda",))
        programs.add(lowered.as_text())
    assert len(programs) == len(tiles) == 3


class FakeTorch(types.SimpleNamespace):
    """Has what is asked of torch; refuses scales of these kinds."""

    def __init__(self, *refused: str):
        super().__init__(float8_e4m3fn="e4m3", bfloat16="bf16", refused=refused, calls=[],
                         cuda=types.SimpleNamespace(synchronize=lambda: None))

    def randn(self, *shape, device):
        return _Tensor(shape)

    zeros = ones = randn

    def _scaled_mm(self, x, w, *, scale_a, scale_b, out_dtype, use_fast_accum=False):
        kind = "rows" if scale_a.shape[1] == 1 else "blocks"
        if kind in self.refused:
            raise RuntimeError(f"no {kind}\nin this version")
        assert x.shape[1] == w.shape[0]
        self.calls.append((kind, scale_a.shape, scale_b.shape))


class _Tensor:
    def __init__(self, shape):
        self.shape = shape

    def to(self, dtype):
        return self

    def t(self):
        return _Tensor(self.shape[::-1])

    def add_(self, number):
        return self


@pytest.mark.parametrize(("refused", "scales", "shapes"), [
    ((), "blocks", ((256, 4), (4, 5))), (("blocks",), "rows", ((256, 1), (1, 576)))])
def test_torch_takes_the_finest_scales_that_it_has(refused, scales, shapes):
    torch = FakeTorch(*refused)
    found = torch_rival.time_product(torch, 256, 576, 512, calls=1, repeats=3)
    assert found.scales == scales
    assert found.timing is not None
    assert set(torch.calls) == {(scales, *shapes)}


def test_torch_that_can_not_says_why():
    found = torch_rival.time_product(FakeTorch("blocks", "rows"), 256, 576, 512)
    assert found == ("", None, "blocks: no blocks; rows: no rows")
    if importlib.util.find_spec("torch") is None:
        assert torch_rival.find_torch() == (None, "torch is not installed")
