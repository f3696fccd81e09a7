"""The LogFMT kernels as compilers see them: one backend for each platform, and machine code for cards and chips not
here."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from pallas_kernels.logfmt import decode, encode
from tests.pallas_kernels.compiling import check_compiled, in_new_process

pytestmark = pytest.mark.slow

KERNELS = {"mosaic_gpu": "@mosaic_gpu", "tpu": "@tpu_custom_call"}


@pytest.mark.parametrize(("platform", "rows", "bits", "expected"), [
    ("cuda", 256, 10, {"mosaic_gpu"}), ("cuda", 255, 10, set()), ("tpu", 255, 10, {"tpu"}), ("tpu", 256, 9, set()),
    ("cpu", 256, 10, set())])
def test_a_platform_gets_its_backend_and_no_other(platform, rows, bits, expected):
    x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
    text = jax.jit(lambda x: decode(*encode(x, bits))).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert {name for name, call in KERNELS.items() if call in text} == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("hardware", "rows", "width", "bits"), [
    ("v5p", 4096, 7168, 10), ("v6e", 300, 2048, 7), ("tpu7x", 5, 7168, 15)])
def test_compiles_for_tpus(hardware, rows, width, bits):
    """Two kernels, and nothing beside them but the ends, of which a tile's 4 bytes fill a row of 128 numbers."""
    def there_and_back(x):
        codes, ends = encode(x, bits)
        return codes, ends, decode(codes, ends)
    made = compile_kernel(hardware, there_and_back, [jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)])
    check_compiled(made, hardware, temporary_bytes=5 * rows * 128 * 4, kernels=2)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel each, no registers spilled, and no memory beside the results but for ends, which are transposed.

    Rows of few tiles, odd numbers of bits and widths that 128 does not divide compile too: what the interpreter takes
    TMA may not.
    """
    compiled = in_new_process(compile_both_ways)
    assert len(compiled) == 8
    for name, made in compiled.items():
        check_compiled(made, name, temporary_bytes=2 ** 22)


def compile_both_ways() -> dict[tuple, CompiledKernel]:
    compiled = {}
    for rows, width, bits, dtype in ((4096, 7168, 10, jnp.bfloat16), (4096, 2048, 16, jnp.float32),
                                     (8, 192, 13, jnp.bfloat16), (160, 2112, 12, jnp.bfloat16)):
        tiles = -(-width // 128)
        x, codes, ends = (jax.ShapeDtypeStruct((rows, columns), kind) for columns, kind in (
            (width, dtype), (tiles * 16 * bits, jnp.uint8), (2 * tiles, dtype)))
        encoding, decoding = functools.partial(encode, bits=bits), functools.partial(decode, width=width)
        compiled["encode", x.shape, bits] = compile_kernel("h100", encoding, [x])
        compiled["decode", x.shape, bits] = compile_kernel("h100", decoding, [codes, ends])
    return compiled
