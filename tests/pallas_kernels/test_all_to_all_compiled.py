"""Dispatch and combine as compilers see them: one backend for each platform, and machine code for cards and chips not
here, on meshes of one fast domain and of several."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.codesign.kernels import CompiledKernel, compile_program
from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import FAST_AXES
from pallas_kernels.all_to_all_combine import all_to_all_combine, combine_start, combine_wait
from pallas_kernels.all_to_all_dispatch import all_to_all_dispatch, dispatch_start, dispatch_wait, make_route
from tests.pallas_kernels.all_to_all_cases import AXIS, mesh
from tests.pallas_kernels.compiling import in_new_process

pytestmark = pytest.mark.slow

ROWS, COPIES, PLACES, WIDTH = 2048, 4, 640, 7168
KERNELS = {"mosaic_gpu": "@mosaic_gpu", "tpu": "@tpu_custom_call"}


def there_and_back(axis):
    """Both kernels, their gradients, and float8 on the wire, cast there or before."""
    def loss(rows, weights, route):
        slots = all_to_all_dispatch(rows, route, axis)
        home = all_to_all_combine(jnp.tanh(slots), route, axis, jnp.float32, weights_RK=weights)
        return jnp.sum(home * home)

    def run(source, slot, rows, weights):
        route = make_route(source, slot, axis)
        pair = all_to_all_dispatch(rows, route, axis, wire="float8")
        forwarded = all_to_all_dispatch(tuple(part[:rows.shape[0]] for part in pair), route, axis)
        return pair, forwarded, jax.grad(loss, (0, 1))(rows, weights, route)
    return run


def beside_compute(source, slot, rows, weights):
    """A dispatch and a combine with a matrix product beside each."""
    route = make_route(source, slot, FAST_AXES)
    in_flight = dispatch_start(rows, route, FAST_AXES)
    square = rows[:, :ROWS]
    first = in_flight.before(square) @ square
    slots = dispatch_wait(in_flight, after=first)
    in_flight = combine_start(slots, route, FAST_AXES, weights_RK=weights)
    second = in_flight.before(first) @ first
    return combine_wait(in_flight, after=second), second


def operands(mesh, ranks: int, width: int = WIDTH, rows: int = ROWS) -> list[jax.ShapeDtypeStruct]:
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shapes = (((ranks * PLACES,), jnp.int32), ((rows, COPIES), jnp.int32), ((rows, width), jnp.bfloat16),
              ((rows, COPIES), jnp.float32))
    return [jax.ShapeDtypeStruct((mesh.size * first, *rest), dtype, sharding=spread)
            for (first, *rest), dtype in shapes]


def compile_exchange(run, pod: str, config: MeshConfig) -> tuple[CompiledKernel, str]:
    """(what the compiler made of it, its HLO)."""
    mesh = pod_mesh(parse_pod(pod), config)
    spec = PartitionSpec(mesh.axis_names)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False))
        return compile_program(program, *operands(mesh, config.scale_up * config.context))


def exchanged(text: str) -> set[str]:
    """Dtypes and sizes of what XLA's own collectives exchange."""
    results = re.findall(r"= (\(?[a-z0-9]+\[.*?) (?:all-to-all|ragged-all-to-all|all-gather)(?:-start)?\(", text)
    return {shape for result in results for shape in re.findall(r"[a-z]\w*\[[\d,]*\]", result)}


@pytest.mark.parametrize(("platform", "width", "expected"), [
    ("cuda", 1024, {"mosaic_gpu"}), ("cuda", 160, set()), ("tpu", 1024, {"tpu"}), ("tpu", 160, set()),
    ("cpu", 1024, set())])
def test_a_platform_gets_its_backend_and_no_other(platform, width, expected):
    here, spec = mesh(4, 2), PartitionSpec(AXIS)
    with jax.set_mesh(here):
        program = jax.jit(jax.shard_map(there_and_back(AXIS), in_specs=spec, out_specs=spec, check_vma=False))
        text = program.trace(*operands(here, 8, width, 16)).lower(lowering_platforms=(platform,)).as_text()
    assert {name for name, call in KERNELS.items() if call in text} == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("pod", "config"), [
    pytest.param("v5p:2x2x2", MeshConfig(scale_up=8), marks=pytest.mark.slow),
    ("v6e:2x4", MeshConfig(scale_up=4, context=2)),
    ("v5p:2x2x1,slices=2", MeshConfig(scale_out=2, scale_up=2, context=2))])
def test_compiles_for_tpus(pod, config):
    """Dispatch three times and once backward, combine once and once backward, each with its sum; XLA exchanges nothing
    but numbers of rows and weights."""
    made, text = compile_exchange(there_and_back(FAST_AXES), pod, config)
    assert made.kernels == 8
    assert all(str(WIDTH) not in shape and "128" not in shape for shape in exchanged(text)), exchanged(text)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `aot`")
def test_compute_runs_between_start_and_wait_on_tpu():
    """And nothing is copied that is still on its way."""
    _, text = compile_exchange(beside_compute, "v5p:2x2x1", MeshConfig(scale_up=4))
    entry = text[text.index("ENTRY"):]
    events = re.findall(r"op_name=\"[^\"]*(ici_start|ici_wait|dot_general)", entry)
    order = [event for event, before in zip(events, [None, *events[:-1]], strict=True) if event != before]
    assert order == ["ici_start", "dot_general", "ici_wait"] * 2
    assert not re.search(rf"= \(?bf16\[{4 * PLACES},[^=]* copy(-start)?\(", entry[entry.index("ici_start"):])


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `aot`")
@pytest.mark.parametrize(("pod", "config"), [
    pytest.param("h100:1x8", MeshConfig(scale_up=8), marks=pytest.mark.slow),
    ("h100:8x8", MeshConfig(scale_out=8, scale_up=4, context=2))])
def test_compiles_for_h100(pod, config):
    """On one host and on eight with the axis inside each: no registers spilled, and XLA exchanges nothing but numbers
    of rows and weights."""
    made, text = in_new_process(compile_there_and_back, pod, config)
    assert (made.kernels, made.spilled_bytes) == (6, 0)
    assert all(str(WIDTH) not in shape for shape in exchanged(text)), exchanged(text)


def compile_there_and_back(pod: str, config: MeshConfig) -> tuple[CompiledKernel, str]:
    return compile_exchange(there_and_back(FAST_AXES), pod, config)
