"""The LogFMT kernels as compilers see them: one backend for each platform, and machine code for cards and chips not
here."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import on_each_device
from pallas_kernels.logfmt import decode, encode
from tests.pallas_kernels.compiling import nvidia, print_compiled, run_compilations, shaped

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
@pytest.mark.parametrize(("pod", "rows", "width", "bits"), [
    ("v5p:2x2x1", 4096, 7168, 10), ("v6e:2x2", 300, 2048, 7), ("tpu7x:2x2x1", 5, 7168, 15)])
def test_compiles_for_tpus(pod, rows, width, bits):
    """Two kernels, and nothing beside them but the ends, of which a tile's 4 bytes fill a row of 128 numbers."""
    mesh = pod_mesh(parse_pod(pod), MeshConfig())
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def there_and_back(x):
        codes, ends = encode(x, bits)
        return codes, ends, decode(codes, ends)
    with jax.set_mesh(mesh):
        compiled = jax.jit(on_each_device(there_and_back, PartitionSpec(), PartitionSpec())).lower(x).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * rows * 128 * 4


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """One kernel each, no registers spilled, and no memory beside the results but for ends, which are transposed.

    Rows of few tiles, odd numbers of bits and widths that 128 does not divide compile too: what the interpreter takes
    TMA may not.
    """
    results, log = run_compilations(__file__)
    assert len(results) == 8
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(results)
    for result in results:
        assert result["kernels"] == 1, result
        assert result["temporary_bytes"] < 2 ** 22, result


def compile_for_h100() -> None:
    """Prints what the compiler made of encoding and decoding."""
    for rows, width, bits, dtype in ((4096, 7168, 10, jnp.bfloat16), (4096, 2048, 16, jnp.float32),
                                     (8, 192, 13, jnp.bfloat16), (160, 2112, 12, jnp.bfloat16)):
        tiles = -(-width // 128)
        x, codes, ends = (shaped(nvidia(), rows, columns, dtype=kind) for columns, kind in (
            (width, dtype), (tiles * 16 * bits, jnp.uint8), (2 * tiles, dtype)))
        shape = [rows, width, bits]
        print_compiled(lambda x, bits=bits: encode(x, bits), x, operation="encode", shape=shape, dtype=x.dtype.name)
        print_compiled(lambda codes, ends, width=width: decode(codes, ends, width=width), codes, ends,
                       operation="decode", shape=shape, dtype=x.dtype.name)


if __name__ == "__main__":
    compile_for_h100()
