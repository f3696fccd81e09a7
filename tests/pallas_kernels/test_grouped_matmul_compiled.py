"""The grouped product as compilers see it: one backend for each platform, and machine code for cards and chips that
are not here."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv3_jax.codesign.hlo import Walk, matrix_flops, parse
from dsv3_jax.codesign.kernels import CompiledKernel, compile_kernel
from dsv3_jax.codesign.pods import parse_pod, pod_devices, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import on_each_device
from pallas_kernels.grouped_matmul import grouped_matmul
from tests.pallas_kernels.compiling import backends, check_compiled, in_new_process

EXPERTS, ROWS = 4, 49_152
SHAPES = {"gate and up": (7168, 4096), "down": (2048, 7168), "DeepSeek-V2-Lite's down": (1408, 2048)}


def lowered_step(platform: str, alignment: int, dtype, device=None) -> str:
    """The StableHLO of gradients through a scan of recomputed layers under `shard_map`."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=[device or jax.devices()[0]])
    rows, shard = PartitionSpec("x"), PartitionSpec()

    def layer(hidden_PD, weights):
        sizes = jnp.full((2,), 128, jnp.int32)
        inner = grouped_matmul(hidden_PD, weights[0], sizes, alignment=alignment)
        return grouped_matmul(jax.nn.silu(inner), weights[1], sizes, alignment=alignment)

    def loss(hidden_PD, weights):
        sharded = jax.shard_map(layer, mesh=mesh, in_specs=(rows, shard), out_specs=rows, check_vma=False)
        step = jax.checkpoint(sharded)
        return jnp.sum(jax.lax.scan(lambda h, w: (h + step(h, w), None), hidden_PD, weights)[0].astype(jnp.float32))
    shapes = (jax.ShapeDtypeStruct((512, 128), dtype),
              (jax.ShapeDtypeStruct((3, 2, 128, 256), dtype), jax.ShapeDtypeStruct((3, 2, 256, 128), dtype)))
    return jax.jit(jax.grad(loss, (0, 1))).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "alignment", "dtype", "expected"), [
    ("cuda", 128, jnp.bfloat16, "mosaic_gpu"), ("cuda", 8, jnp.bfloat16, "dot_general"),
    ("cuda", 128, jnp.float32, "dot_general"), ("cuda", 1, jnp.bfloat16, "ragged_dot"),
    ("tpu", 128, jnp.bfloat16, "tpu_kernel"), ("tpu", 1, jnp.float32, "tpu_kernel"),
    ("tpu", 8, jnp.float16, "dot_general"), ("tpu", 1, jnp.float16, "ragged_dot"),
    ("cpu", 128, jnp.bfloat16, "dot_general"), ("cpu", 1, jnp.float32, "dot_general")])
def test_a_platform_gets_its_backend_and_no_other(platform, alignment, dtype, expected):
    assert backends(lowered_step(platform, alignment, dtype)) == {expected}


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("pod", "expected"), [("h100:1x1", "mosaic_gpu"), ("b200:1x1", "dot_general")])
def test_only_hopper_gets_the_kernel_of_hopper(pod, expected):
    """Blackwell has no `wgmma`."""
    device = pod_devices(parse_pod(pod))[0]
    assert backends(lowered_step("cuda", 128, jnp.bfloat16, device)) == {expected}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize("pod", ["v5p:2x2x1", *(pytest.param(pod, marks=pytest.mark.slow)
                                               for pod in ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"))])
def test_compiles_for_tpus(pod):
    """Three ragged kernels for the product and its gradients, and no product of every row with every group."""
    mesh, (width, inner) = pod_mesh(parse_pod(pod), MeshConfig()), SHAPES["down"]
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
                for shape, dtype in (((ROWS, width), jnp.bfloat16), ((EXPERTS, width, inner), jnp.bfloat16),
                                     ((EXPERTS,), jnp.int32), ((ROWS, inner), jnp.bfloat16))]

    def both(rows, weights, sizes, cotangent):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, alignment=128), rows, weights)
        return out, pull(cotangent)
    with jax.set_mesh(mesh):
        everywhere = on_each_device(both, PartitionSpec(), PartitionSpec())
        text = jax.jit(everywhere).lower(*operands).compile().as_text()
    products = [(line.opcode, times * matrix_flops(computation, line))
                for computation, line, times in Walk(parse(text), {}).instructions()]
    assert [product for product in products if product[1]] == 3 * [("custom-call", 2.0 * ROWS * width * inner)]


def test_says_once_why_the_slow_way(caplog):
    rows, weights, sizes = jnp.ones((64, 192), jnp.bfloat16), jnp.ones((2, 192, 128), jnp.bfloat16), jnp.zeros(2, int)
    with caplog.at_level("DEBUG", logger="pallas_kernels.grouped_matmul.api"):
        for _ in range(2):
            grouped_matmul(rows, weights, sizes, alignment=64)
    assert [record.getMessage().count("'tiled'") for record in caplog.records] == [1]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
def test_compiles_for_h100():
    """No dot, so no dense product; no copy of rows or weights; and no registers spilled."""
    compiled = in_new_process(compile_passes)
    for name in SHAPES:
        check_compiled(compiled[name, "forward"], name, temporary_bytes=2 ** 20)
        check_compiled(compiled[name, "gradients"], name, temporary_bytes=2 ** 20, kernels=2)


def compile_passes() -> dict[tuple[str, str], CompiledKernel]:
    def forward(rows, weights, sizes):
        return grouped_matmul(rows, weights, sizes, alignment=128)

    def gradients(rows, weights, sizes, cotangent):
        return jax.vjp(lambda x, w: forward(x, w, sizes), rows, weights)[1](cotangent)
    compiled = {}
    for name, (width, inner) in SHAPES.items():
        rows, weights, cotangent = (jax.ShapeDtypeStruct(shape, jnp.bfloat16)
                                    for shape in ((ROWS, width), (EXPERTS, width, inner), (ROWS, inner)))
        operands = rows, weights, jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
        compiled[name, "forward"] = compile_kernel("h100", forward, operands)
        compiled[name, "gradients"] = compile_kernel("h100", gradients, (*operands, cotangent))
    return compiled
