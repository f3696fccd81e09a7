"""Causal attention and its gradient as compilers see them, at DeepSeek-V3's shapes: 128 heads, 4096 tokens."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from pallas_kernels.mla_attention import mla_attention
from tests.pallas_kernels.compiling import backends, check_compiled, in_new_process

HEADS, WIDTHS = 128, (128, 64, 256)


def operands(rows: int, queries: int, keys: int, heads: int = HEADS, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    """As projections give them, heads beside each other."""
    shapes = [(rows, count, heads * width) for count, width in zip((queries, queries, keys), WIDTHS, strict=True)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in (*shapes, (rows, keys, WIDTHS[1]))]


def forward(*flat, **more):
    """[B, Q, H*V] of `operands`."""
    apart = [x.reshape(*x.shape[:2], -1, width) for x, width in zip(flat[:3], WIDTHS, strict=True)]
    out = mla_attention(*apart, flat[3], scale=0.1, **more)
    return out.reshape(*out.shape[:2], -1)


def gradients(dout, *flat):
    return jax.vjp(forward, *flat)[1](dout)


def chunk(lengths, start, *flat):
    return forward(*flat, lengths_B=lengths, start=start)


def lowered_step(platform: str, dtype) -> str:
    """The StableHLO of gradients through a scan of recomputed layers."""
    def layer(hidden, operands):
        return hidden + forward(*operands) * hidden, None

    def loss(hidden, operands):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), hidden, operands)[0].astype(jnp.float32))
    layers = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in operands(1, 256, 256, 2, dtype)]
    hidden = jax.ShapeDtypeStruct((1, 256, 256), dtype)
    return jax.jit(jax.grad(loss, (0, 1))).trace(hidden, layers).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "dtype", "expected"), [
    ("cuda", jnp.bfloat16, "mosaic_gpu"), ("cuda", jnp.float32, "dot_general"), ("tpu", jnp.float32, "tpu_kernel"),
    ("tpu", jnp.float16, "dot_general"), ("cpu", jnp.bfloat16, "dot_general")])
def test_a_platform_gets_its_backend_and_no_other(platform, dtype, expected):
    assert backends(lowered_step(platform, dtype)) == {expected}


def programs() -> dict[str, tuple]:
    """name -> (function, operands, kernels)."""
    training, dout = operands(1, 4096, 4096), jax.ShapeDtypeStruct((1, 4096, HEADS * 128), jnp.bfloat16)
    scalars = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return {"forward": (forward, training, 1), "gradients": (gradients, [dout, *training], 3),
            "a chunk of 512 of 32k": (chunk, [*scalars, *operands(4, 512, 32768)], 1)}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize("hardware", ["v5p", pytest.param("v6e", marks=pytest.mark.slow),
                                      pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_compiles_for_tpus(hardware):
    """Kernels alone, which find room in VMEM. Temporary memory is for what the backward keeps, the result of 128 MiB
    and two numbers for each query and head, which the forward and the kernels' own layouts take twice; there is no copy
    of queries, keys or values."""
    for name, (function, shapes, kernels) in programs().items():
        check_compiled(compile_kernel(hardware, function, shapes), name, 2 ** 28, kernels)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """Kernels alone, within shared memory, no registers spilled, no copy of queries, keys or values. The backward keeps
    the result, 128 MiB, and has the rotated keys' gradients of each head, as much again."""
    for name, made in in_new_process(compile_programs).items():
        check_compiled(made, name, 2 ** 28 + 2 ** 24, programs()[name][2])


def compile_programs() -> dict[str, CompiledKernel]:
    return {name: compile_kernel("h100", function, shapes) for name, (function, shapes, _) in programs().items()}
