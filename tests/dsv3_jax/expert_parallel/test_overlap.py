"""Functions side by side give what they give alone, to the bit, and what exchanges wait beside is computing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.expert_parallel.operations import lines_of
from dsv3_jax.expert_parallel.overlap import Task, overlapped, side_by_side
from dsv3_jax.mesh import make_mesh, on_each_device
from pallas_kernels.grouped_matmul import grouped_matmul

WIDTH, ROWS, DEVICES = 16, 8, 4
WHOLE, SPREAD = PartitionSpec(), PartitionSpec("scale_up")


@jax.custom_vjp
def exchange(x):
    return jax.lax.all_to_all(x, "scale_up", 0, 0, tiled=True)


exchange.defvjp(lambda x: (exchange(x), None), lambda _, g: (exchange(g),))


@jax.jit
def layer(weights, x):
    for weight in weights:
        x = x + exchange(jnp.tanh(exchange(jnp.sin(x @ weight)) @ weight.T))
    return x


MODELS = {"plain": layer, "recomputed": jax.checkpoint(layer)}


def operands(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return (jax.random.normal(keys[0], (2, WIDTH, WIDTH)) / 4,
            jax.random.normal(keys[1], (DEVICES * ROWS, WIDTH)))


def call(function, specs, out, *arguments):
    """Traced and run with the mesh in use."""
    mesh = make_mesh(MeshConfig(scale_up=DEVICES), jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        return jax.jit(on_each_device(function, specs, out))(*arguments)


@pytest.mark.parametrize("model", list(MODELS))
def test_a_forward_beside_a_backward(model):
    """Of two micro-batches, with the weights of two stages."""
    run = MODELS[model]
    (one, x), (other, y) = operands(0), operands(1)

    def backward(weights, y):
        return jax.vjp(run, weights, y)[1](jnp.cos(y))

    def together(one, x, other, y):
        forward, (d_weights, d_y) = side_by_side(Task(run, one, x), Task(backward, other, y))
        return forward, jax.lax.psum(d_weights, "scale_up"), d_y

    def apart(one, x, other, y):
        d_weights, d_y = backward(other, y)
        return run(one, x), jax.lax.psum(d_weights, "scale_up"), d_y
    specs, out = (WHOLE, SPREAD, WHOLE, SPREAD), (SPREAD, WHOLE, SPREAD)
    for got, expected in zip(call(together, specs, out, one, x, other, y), call(apart, specs, out, one, x, other, y),
                             strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("model", list(MODELS))
def test_gradients_of_halves(model):
    run = MODELS[model]

    def halves(weights, values):
        return [run(weights, x) for x in values], jnp.int32(len(values))

    def loss(function, weights, x, y):
        (one, other), count = function(weights, (x, y))
        return jnp.sum(one ** 2) + count * jnp.sum(jnp.sin(other))
    weights, x = operands(0)
    _, y = operands(1)

    def gradients(function):
        def run(weights, x, y):
            d_weights, *others = jax.grad(functools.partial(loss, function), argnums=(0, 1, 2))(weights, x, y)
            return jax.lax.psum(d_weights, "scale_up"), *others
        return call(run, (WHOLE, SPREAD, SPREAD), (WHOLE, SPREAD, SPREAD), weights, x, y)
    for got, expected in zip(gradients(overlapped(halves)), gradients(halves), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def between_barriers(jaxpr):
    """The names of operations of each part, in order."""
    parts: list[list[str]] = [[]]
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            parts.append([])
        else:
            parts[-1].append(equation.primitive.name)
    return parts


def test_each_exchange_has_a_product_beside_it():
    """Of two halves: all but what only ends one of them."""
    found = []

    def run(weights, x, y):
        def both(weights, x, y):
            return side_by_side(Task(layer, weights, x), Task(layer, weights, y))
        found.append(jax.make_jaxpr(both)(weights, x, y).jaxpr)
        return both(weights, x, y)
    weights, x = operands(0)
    call(run, (WHOLE, SPREAD, SPREAD), [SPREAD, SPREAD], weights, x, x)
    parts = [part for part in between_barriers(found[0]) if "all_to_all" in part]
    assert sum(part.count("all_to_all") for part in parts) == 2 * 4
    assert [part.count("all_to_all") for part in parts] == [1] * len(parts)
    covered = ["dot_general" in part for part in parts]
    assert sum(covered) >= len(covered) - 1


def test_what_reads_an_exchange_does_not_end_it_early():
    """What leads to no product waits until the products beside the exchange are through."""
    found = []

    def run(weights, x):
        def one(weights, x):
            received = exchange(x)
            return received @ weights[0], jnp.sum(jnp.sin(received))

        def both(weights, x):
            return side_by_side(Task(one, weights, x), Task(lambda weights, x: x @ weights[1], weights, x))
        found.append(jax.make_jaxpr(both)(weights, x).jaxpr)
        return x
    weights, x = operands(0)
    call(run, (WHOLE, SPREAD), SPREAD, weights, x)
    (beside,) = (part for part in between_barriers(found[0]) if "all_to_all" in part)
    assert "dot_general" in beside
    assert "sin" not in beside


def test_what_nobody_reads_is_not_exchanged():
    def wasteful(weights, x):
        layer(weights, x)
        return x @ weights[0]
    found = []

    def run(weights, x):
        found.append(jax.make_jaxpr(lambda: side_by_side(Task(wasteful, weights, x)))().jaxpr)
        return x
    weights, x = operands(0)
    call(run, (WHOLE, SPREAD), SPREAD, weights, x)
    assert [name for part in between_barriers(found[0]) for name in part] == [
        "slice", "squeeze", "dot_general"]


def test_costs():
    """FLOPs of products times bytes of a number, loops by their length; bytes sent, on the slow network 4 times."""
    def run(x, w):
        y = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
        y = jax.lax.all_to_all(y, "scale_out", 0, 0, tiled=True)
        return jax.lax.all_to_all(y, "scale_up", 0, 0, tiled=True) @ w
    found = []

    def local(x, w):
        found.append(lines_of(jax.make_jaxpr(run)(x, w), iter(range(1000))).lines)
        return x
    mesh = make_mesh(MeshConfig(scale_up=2, scale_out=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        on_each_device(local, (WHOLE, WHOLE), WHOLE)(jnp.zeros((ROWS, WIDTH), jnp.bfloat16),
                                                     jnp.zeros((WIDTH, WIDTH), jnp.bfloat16))
    product = 2 * ROWS * WIDTH * WIDTH * 2
    sent = ROWS * WIDTH * 2
    assert [(line.computing, line.sent, line.talks) for line in found[0] if line.matters] == [
        (3 * product, 0, False), (0, 4 * sent, True), (0, sent, True), (product, 0, False)]


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6e", "NVIDIA H100 80GB HBM3"])
def test_costs_of_experts(kind):
    """A product, and its two gradients, whichever kernel or loop the chip has for them."""
    groups, rows, width, inner = 4, 256, 128, 384
    operands = (jnp.zeros((rows, width), jnp.bfloat16), jnp.zeros((groups, width, inner), jnp.bfloat16),
                jnp.full(groups, rows // groups, jnp.int32), jnp.zeros((rows, inner), jnp.bfloat16))

    def run(x, w, sizes, grads):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, alignment=64), x, w)
        return y, pull(grads)
    platform = "tpu" if "TPU" in kind else "gpu"
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        lines = lines_of(jax.make_jaxpr(run)(*operands), iter(range(1000))).lines
    assert [line.computing for line in lines if line.matters] == [pytest.approx(2 * rows * width * inner * 2)] * 3
