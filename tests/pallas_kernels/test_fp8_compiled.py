"""The float8 kernels as compilers see them, at the published shapes."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from pallas_kernels import tuning
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from tests.pallas_kernels.compiling import backends, check_compiled, in_new_process

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


def compile_for(hardware: str, name: str, shape: tuple[int, int, int], **options) -> CompiledKernel:
    function, operands = problems(*shape)[name]
    return compile_kernel(hardware, functools.partial(function, **options),
                          [jax.ShapeDtypeStruct(*operand) for operand in operands])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("hardware", "names"), [
    ("v5p", ("product", "gradient")), ("v6e", ("grouped product", "grouped gradient")),
    ("tpu7x", ("gradient", "grouped product"))])
def test_compiles_for_tpus(hardware, names):
    """One kernel an operation, and no copy of an operand or a result. Dense operations are kernels of one group."""
    for name in names:
        check_compiled(compile_for(hardware, name, (4096, 4096, 7168)), name, temporary_bytes=2 ** 25)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel an operation, no copy of an operand, and no registers spilled."""
    compiled = in_new_process(compile_operations)
    assert len(compiled) == 5
    for name, made in compiled.items():
        check_compiled(made, name, temporary_bytes=2 ** 24)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_every_tile_and_every_published_shape_compile_for_h100():
    compiled = in_new_process(compile_tiles_and_shapes)
    assert len(compiled) > 40
    for name, made in compiled.items():
        check_compiled(made, name, temporary_bytes=2 ** 24)


def compile_operations() -> dict[str, CompiledKernel]:
    shape = (4096, 4096, 7168)
    in_float32 = compile_for("h100", "product", (4096, 576, 7168), dtype=jnp.float32)
    return {name: compile_for("h100", name, shape) for name in problems(*shape)} | {"product in float32": in_float32}


def compile_tiles_and_shapes() -> dict[tuple, CompiledKernel]:
    compiled = {(name, shape): compile_for("h100", name, shape) for name, shapes in TILES.items() for shape in shapes}
    for name, shapes in tuning.CANDIDATES.items():
        for tile in shapes:
            with tuning.only(name, tile):
                for dtype in ("bfloat16", "float32"):
                    made = compile_for("h100", name, (512, 768, 768), dtype=jnp.dtype(dtype))
                    compiled[name, tile, dtype] = made
    return compiled
