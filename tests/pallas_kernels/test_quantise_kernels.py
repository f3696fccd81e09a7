"""The kernels equal the reference to the bit: interpreted here, looking for races; the Hopper ones on such a GPU for
real, with `pytest --noconftest -o addopts= -k hopper` on this file.

Interpreted memory that was never written is NaN.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import hopper
from pallas_kernels.quantise import dequantise, gpu, quantise, quantise_both, reference, tpu
from tests.pallas_kernels import quantise_oracle as oracle

INTERPRETED = pltpu.InterpretParams(detect_races=True)
CASES = {
    # rows and columns, dtype, power of two, every operation; parts of a square at the ends, or less than a square down
    "bfloat16": ((224, 288), jnp.bfloat16, False, True), "float32": ((32, 288), jnp.float32, True, False)}


def matrix(shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Normal numbers in rows of unlike magnitude, and tiles with a NaN, with an infinity, and of zeros."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-13, 1, size=(shape[0], 1))
    x[3, 5], x[5, 130], x[7, :128], x[:, 140] = np.nan, -np.inf, 0, 0
    return jnp.asarray(x, dtype)


def assert_kernels_equal(module, x: jax.Array, power_of_two: bool, every: bool, how: dict) -> None:
    """`quantise_both` has the bodies of the other two."""
    want, want_transposed = (oracle.quantise(np.asarray(a), (1, 128), power_of_two) for a in (x, x.T))
    for got, expected in zip(module.quantise_both(x, power_of_two, **how), (want, want_transposed), strict=True):
        oracle.assert_same(got, expected)
    if every:
        oracle.assert_same(module.quantise(x, (1, 128), power_of_two, **how), want)
        oracle.assert_same(module.quantise_transposed(x, power_of_two, **how), want_transposed)


@pytest.mark.parametrize(("shape", "dtype", "power_of_two", "every"), CASES.values(), ids=CASES.keys())
def test_tpu(shape, dtype, power_of_two, every):
    x, how = matrix(shape, dtype), {"interpret": INTERPRETED}
    assert_kernels_equal(tpu, x, power_of_two, every, how)
    for tile in ((128, 1), (128, 128))[0 if every else 1:]:
        want = oracle.quantise(np.asarray(x), tile, power_of_two)
        oracle.assert_same(tpu.quantise(x, tile, power_of_two, **how), want)
    gate_up = 3 * x[:, :256]
    oracle.assert_same(tpu.swiglu_quantise(gate_up, power_of_two, **how),
                       jax.jit(reference.swiglu_quantise, static_argnums=1)(gate_up, power_of_two))


def test_tpu_stacks_matrices():
    """Weights of experts in blocks, and tokens of a batch in rows."""
    for shape, tile in (((2, 128, 144), (128, 128)), ((2, 5, 144), (1, 128))):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        assert not tpu.misfit("quantise", x.shape, x.dtype, tile)
        oracle.assert_same(tpu.quantise(x, tile, False, interpret=INTERPRETED), reference.quantise(x, tile, False))


@pytest.fixture
def real(monkeypatch):
    """Whether there is such a card. With three multiprocessors each walks over several squares, and some over fewer."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield True
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield False


@pytest.mark.parametrize(("shape", "dtype", "power_of_two", "every"), CASES.values(), ids=CASES.keys())
def test_hopper(real, shape, dtype, power_of_two, every):
    x = matrix(shape, dtype)
    assert_kernels_equal(gpu, x, power_of_two, every, {})
    gate_up = 3 * x[:, :256]
    got = gpu.swiglu_quantise(gate_up, power_of_two)
    want = jax.jit(reference.swiglu_quantise, static_argnums=1)(gate_up, power_of_two)
    if not real:
        oracle.assert_same(got, want)
    else:  # a card's exponential and division differ in the last place, so a code may be the next one: 2^-3 at most
        np.testing.assert_allclose(*(dequantise(*pair, (1, 128)) for pair in (got, want)), rtol=2 ** -3, atol=1e-4)


def test_hopper_stacks_matrices(real):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 160)), jnp.bfloat16)
    oracle.assert_same(gpu.quantise(x, (1, 128), False), reference.quantise(x, (1, 128), False))


@pytest.mark.parametrize(("run", "backend"), [
    (functools.partial(quantise, jnp.ones((4, 128)), (128, 128)), "hopper"),
    (functools.partial(quantise, jnp.ones((3, 128)), (1, 128)), "hopper"),
    (functools.partial(quantise, jnp.ones((4, 120)), (1, 128)), "hopper"),
    (functools.partial(quantise_both, jnp.ones((2, 16, 128))), "hopper"),
    (functools.partial(quantise_both, jnp.ones((8, 128))), "hopper"),
    (functools.partial(quantise, jnp.ones((4, 128)), None), "tpu"),
    (functools.partial(quantise, jnp.ones((2, 8, 128)), (128, 128)), "tpu"),
    (functools.partial(quantise, jnp.ones((0, 128)), (1, 128)), "tpu"),
    (functools.partial(quantise_both, jnp.ones((2, 128, 128))), "tpu")])
def test_refuses_what_it_does_not_serve_and_does_it_otherwise(run, backend):
    with pytest.raises(ValueError, match=f"no {backend} kernel"):
        run(backend=backend)
    jax.eval_shape(run)
