"""The float8 kernels as compilers see them, at the published shapes."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import on_each_device
from pallas_kernels import tuning
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from tests.pallas_kernels.compiling import backends, nvidia, print_compiled, run_compilations

FP8, F32 = jnp.float8_e4m3fn, jnp.float32
EXPERTS, GROUPED_ROWS = 4, 32_768
# Rows (of a gradient: tokens), columns, terms (of a gradient: the other side's rows).
TILES = {"product": [(m, n, k) for m in (1, 128, 4096)
                     for n, k in ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168),
                                  (7168, 2048))],
         "gradient": [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 576, 7168), (4096, 2112, 7168)]}


def tiles(*shape: int, rows: int = 1) -> list[tuple]:
    """(shape, dtype) of values and of their scales."""
    scales = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // 128))
    return [(shape, FP8), (scales, F32)]


def problems(m: int, n: int, k: int) -> dict[str, tuple]:
    """name -> (function, its operands' shapes and dtypes)."""
    sizes = ((EXPERTS,), jnp.int32)
    return {"product": (fp8_matmul, [*tiles(m, k), *tiles(n, k, rows=128)]),
            "gradient": (fp8_wgrad, [*tiles(n, m), *tiles(k, m), ((n, k), F32)]),
            "grouped product": (grouped_fp8_matmul, [*tiles(GROUPED_ROWS, k), *tiles(EXPERTS, n, k, rows=128), sizes]),
            "grouped gradient": (grouped_fp8_wgrad, [*tiles(n, GROUPED_ROWS), *tiles(k, GROUPED_ROWS), sizes])}


@pytest.mark.parametrize(("platform", "shape", "expected"), [
    ("cuda", (256, 576, 256), {"mosaic_gpu"}), ("tpu", (256, 576, 256), {"tpu_kernel"}),
    ("cpu", (256, 576, 256), {"dot_general"}), ("cuda", (256, 100, 300), {"dot_general"})])
def test_a_platform_gets_its_backend_and_no_other(platform, shape, expected):
    for name, (function, operands) in problems(*shape).items():
        arguments = [jax.ShapeDtypeStruct(*operand) for operand in operands]
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
        assert backends(lowered.as_text()) == expected, name


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("pod", "names"), [
    ("v5p:2x2x1", ("product", "gradient")), ("v6e:2x2", ("grouped product", "grouped gradient")),
    ("tpu7x:2x2x1", ("gradient", "grouped product"))])
def test_compiles_for_tpus(pod, names):
    """One kernel an operation, and no copy of an operand or a result. Dense operations are kernels of one group."""
    mesh = pod_mesh(parse_pod(pod), MeshConfig())
    for name in names:
        function, operands = problems(4096, 4096, 7168)[name]
        arguments = [jax.ShapeDtypeStruct(*operand, sharding=NamedSharding(mesh, PartitionSpec()))
                     for operand in operands]
        with jax.set_mesh(mesh):
            everywhere = on_each_device(function, PartitionSpec(), PartitionSpec())
            compiled = jax.jit(everywhere).lower(*arguments).compile()
        text = compiled.as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1, name
        assert " dot(" not in text, name
        assert " convolution(" not in text, name
        assert compiled.memory_analysis().temp_size_in_bytes < 2 ** 25, name


def check_compilations(*arguments: str) -> int:
    results, log = run_compilations(__file__, *arguments)
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(results)
    assert "C7510" not in log, "ptxas runs wgmma one at a time"
    for result in results:
        assert result["kernels"] == 1, result
        assert result["dots"] == 0, result
        assert result["temporary_bytes"] < 2 ** 24, result
    return len(results)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel an operation, no copy of an operand, and no registers spilled."""
    assert check_compilations("few") == 5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_every_tile_and_every_published_shape_compile_for_h100():
    assert check_compilations("all") > 40


def compile_for_h100(which: str) -> None:
    """Prints what the compiler made of each operation, as lines of JSON."""
    at = SingleDeviceSharding(nvidia())

    def compile_one(name: str, shape: tuple[int, int, int], **options) -> None:
        function, operands = problems(*shape)[name]
        arguments = [jax.ShapeDtypeStruct(*operand, sharding=at) for operand in operands]
        print_compiled(functools.partial(function, **options), *arguments, name=name, shape=shape)
    if which == "few":
        for name in problems(1, 1, 1):
            compile_one(name, (4096, 4096, 7168))
        compile_one("product", (4096, 576, 7168), dtype=jnp.float32)
        return
    for name, shapes in TILES.items():
        for shape in shapes:
            compile_one(name, shape)
    for name, shapes in tuning.CANDIDATES.items():
        for tile in shapes:
            with tuning.only(name, tile):
                for dtype in (jnp.bfloat16, jnp.float32):
                    compile_one(name, (512, 768, 768), dtype=dtype)


if __name__ == "__main__":
    import sys
    compile_for_h100(sys.argv[1])
