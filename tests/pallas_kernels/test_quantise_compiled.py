"""The casts as compilers see them: one backend for each platform, and machine code for cards and chips not here."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from pallas_kernels.quantise import quantise, quantise_both, quantise_transposed, swiglu_quantise
from tests.pallas_kernels.compiling import check_compiled, in_new_process

ROWS, WIDTH = 4096, 7168
KERNELS = {"mosaic_gpu": "@mosaic_gpu", "tpu": "@tpu_custom_call"}


def by_rows(x):
    return quantise(x, (1, 128))


def by_blocks(x):
    return quantise(x, (128, 128))


@pytest.mark.parametrize(("platform", "operation", "rows", "expected"), [
    ("cuda", by_rows, 256, {"mosaic_gpu"}), ("cuda", by_rows, 255, set()), ("cuda", by_blocks, 256, set()),
    ("tpu", by_rows, 255, {"tpu"}), ("tpu", quantise_both, 256, {"tpu"}), ("cpu", quantise_both, 256, set())])
def test_a_platform_gets_its_backend_and_no_other(platform, operation, rows, expected):
    x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
    text = jax.jit(operation).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert {name for name, call in KERNELS.items() if call in text} == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("hardware", "width"), [
    ("v5p", 7168), pytest.param("v6e", 576, marks=pytest.mark.slow), ("tpu7x", 7168)])
def test_compiles_for_tpus(hardware, width):
    """Six kernels, for a model's width and for DeepSeek-V3's narrowest, and nothing else as large as x beside them."""
    def casts(x, gate_up):
        return (by_rows(x), by_blocks(x), quantise(x, (128, 1), power_of_two=True), quantise_transposed(x),
                quantise_both(x), swiglu_quantise(gate_up))
    operands = [jax.ShapeDtypeStruct((ROWS, columns), jnp.bfloat16) for columns in (width, 4096)]
    # Scales: they leave the kernel with rows of 128 lanes, or transposed.
    check_compiled(compile_kernel(hardware, casts, operands), hardware, temporary_bytes=5 * ROWS * 128 * 4, kernels=6)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize("cases", ["common", pytest.param("others", marks=pytest.mark.slow)])
def test_compiles_for_h100(cases):
    """One kernel each, no registers spilled, and no memory beside the results but for scales, which are transposed.

    Widths that 128 does not divide, 576 of the latents and 2112, and rows that are few or odd compile too: what the
    interpreter takes TMA may not.
    """
    compiled = in_new_process(compile_casts, cases)
    assert len(compiled) == {"common": 5, "others": 7}[cases]
    for name, made in compiled.items():
        check_compiled(made, name, temporary_bytes=2 ** 22)


EVERY = by_rows, quantise_transposed, quantise_both, swiglu_quantise
CASES = {
    "common": ((ROWS, WIDTH, jnp.bfloat16, EVERY), (160, 2112, jnp.float32, (quantise_both,))),
    "others": ((ROWS, WIDTH, jnp.float32, (quantise_both, swiglu_quantise)),
               (ROWS, 576, jnp.bfloat16, (quantise_both,)), (8, 32, jnp.bfloat16, (by_rows,)),
               (96, 96, jnp.bfloat16, (by_rows, quantise_transposed)), (8, 256, jnp.bfloat16, (swiglu_quantise,)))}


def compile_casts(cases: str) -> dict[tuple, CompiledKernel]:
    compiled = {}
    for rows, width, dtype, operations in CASES[cases]:
        x = jax.ShapeDtypeStruct((rows, width), dtype)
        for operation in operations:
            compiled[operation.__name__, x.shape, x.dtype.name] = compile_kernel("h100", operation, [x])
    return compiled
