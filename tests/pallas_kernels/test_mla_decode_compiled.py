"""The decode kernels as compilers see them, at DeepSeek-V3's shapes: 128 heads, 128 rows, 4k to 32k of context."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from pallas_kernels.mla_decode import QuantizedPages, mla_decode
from tests.pallas_kernels.compiling import backends, check_compiled, in_new_process

LATENT, ROPE = 512, 64
run = functools.partial(mla_decode, latent=LATENT, scale=0.1)


def operands(kind: str, rows: int, tokens: int, queries: int = 1, heads: int = 128, page: int = 64,
             lanes: int = 1) -> list:
    """Entries' last dimensions are multiples of `lanes`."""
    def whole(width: int) -> int:
        return -(-width // lanes) * lanes
    pages = rows * tokens // page, page
    if kind == "bf16":
        held: tuple = (jax.ShapeDtypeStruct((*pages, whole(LATENT + ROPE)), jnp.bfloat16),)
    else:
        dtype = {"float8": jnp.float8_e4m3fn, "int8": jnp.int8}[kind]
        held = (jax.ShapeDtypeStruct((*pages, LATENT), dtype),
                jax.ShapeDtypeStruct((pages[0], LATENT // 128, page), jnp.float32),
                jax.ShapeDtypeStruct((*pages, whole(ROPE)), jnp.bfloat16))
    return [jax.ShapeDtypeStruct((rows, queries, heads, LATENT + ROPE), jnp.bfloat16), *held,
            jax.ShapeDtypeStruct((rows, tokens // page), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)]


def flat(query, *rest):
    """The operation of `operands`."""
    *held, table, lengths = rest
    return run(query, held[0] if len(held) == 1 else QuantizedPages(*held), table, lengths)


@pytest.mark.parametrize("kind", ["bf16", "float8"])
@pytest.mark.parametrize(("platform", "page", "expected"), [
    ("cuda", 64, "mosaic_gpu"), ("cuda", 32, "dot_general"), ("tpu", 32, "tpu_kernel"), ("tpu", 8, "dot_general"),
    ("cpu", 64, "dot_general")])
def test_a_platform_gets_its_backend_and_no_other(kind, platform, page, expected):
    lowered = jax.jit(flat).trace(*operands(kind, 2, 128, page=page)).lower(lowering_platforms=(platform,))
    assert backends(lowered.as_text()) == {expected}


SHAPES = {"bf16": ("bf16", 128, 4096), "bf16, four queries, 32k": ("bf16", 128, 32768, 4),
          "float8": ("float8", 128, 4096), "float8, one row of 16 heads": ("float8", 1, 4096, 1, 16),
          "int8, four queries, 32k": ("int8", 128, 32768, 4)}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize("hardware", ["v5p", pytest.param("v6e", marks=pytest.mark.slow),
                                      pytest.param("tpu7x", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_tpus(hardware, name):
    """One kernel, which finds room in VMEM, and no copy of the cache: only of queries and results, which a program's
    own layouts may turn around."""
    shapes = operands(*SHAPES[name], page=128, lanes=128)
    made = compile_kernel(hardware, flat, shapes)
    check_compiled(made, name, temporary_bytes=4 * 2 * shapes[0].size)
    if name == "bf16":
        assert shapes[1].size > 8 * shapes[0].size


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel within shared memory, no registers spilled, no copy of the cache. The parts that one row is split into
    are joined by XLA."""
    for name, made in in_new_process(compile_shapes).items():
        check_compiled(made, name, temporary_bytes=2 ** 24)


def compile_shapes() -> dict[str, CompiledKernel]:
    return {name: compile_kernel("h100", flat, operands(*shape)) for name, shape in SHAPES.items()}
