"""The casts as compilers see them: one backend for each platform, and machine code for cards and chips not here."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import on_each_device
from pallas_kernels.quantise import quantise, quantise_both, quantise_transposed, swiglu_quantise
from tests.pallas_kernels.compiling import nvidia, print_compiled, run_compilations, shaped

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
@pytest.mark.parametrize(("pod", "width"), [("v5p:2x2x1", 7168), ("v6e:2x2", 576), ("tpu7x:2x2x1", 7168)])
def test_compiles_for_tpus(pod, width):
    """Six kernels, for a model's width and for DeepSeek-V3's narrowest, and nothing else as large as x beside them."""
    mesh = pod_mesh(parse_pod(pod), MeshConfig())
    replicated = NamedSharding(mesh, PartitionSpec())

    def casts(x, gate_up):
        return (by_rows(x), by_blocks(x), quantise(x, (128, 1), power_of_two=True), quantise_transposed(x),
                quantise_both(x), swiglu_quantise(gate_up))
    x, gate_up = (jax.ShapeDtypeStruct((ROWS, columns), jnp.bfloat16, sharding=replicated)
                  for columns in (width, 4096))
    with jax.set_mesh(mesh):
        compiled = jax.jit(on_each_device(casts, PartitionSpec(), PartitionSpec())).lower(x, gate_up).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 6
    # Scales: they leave the kernel with rows of 128 lanes, or transposed.
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * ROWS * 128 * 4


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel each, no registers spilled, and no memory beside the results but for scales, which are transposed.

    Widths that 128 does not divide, 576 of the latents and 2112, and rows that are few or odd compile too: what the
    interpreter takes TMA may not.
    """
    results, log = run_compilations(__file__)
    assert len(results) == 12
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(results)
    for result in results:
        assert result["kernels"] == 1, result
        assert result["temporary_bytes"] < 2 ** 22, result


def compile_for_h100() -> None:
    """Prints what the compiler made of each cast."""
    every = by_rows, quantise_transposed, quantise_both, swiglu_quantise
    for rows, width, dtype, operations in (
            (ROWS, WIDTH, jnp.bfloat16, every), (ROWS, WIDTH, jnp.float32, (quantise_both, swiglu_quantise)),
            (ROWS, 576, jnp.bfloat16, (quantise_both,)), (160, 2112, jnp.float32, (quantise_both,)),
            (8, 32, jnp.bfloat16, (by_rows,)), (96, 96, jnp.bfloat16, (by_rows, quantise_transposed)),
            (8, 256, jnp.bfloat16, (swiglu_quantise,))):
        x = shaped(nvidia(), rows, width, dtype=dtype)
        for operation in operations:
            print_compiled(operation, x, operation=operation.__name__, shape=x.shape, dtype=x.dtype.name)


if __name__ == "__main__":
    compile_for_h100()
