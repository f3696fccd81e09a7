"""The LogFMT kernels equal the reference to the bit, interpreted here, looking for races: they take the same steps, and
interpreted the same logarithms. The Hopper ones run on such a GPU for real, with `pytest --noconftest -o addopts=
-k hopper` on this file, where the card's own logarithms may take the neighbouring code: that they are as near is what
the search over all values then tells.

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
from pallas_kernels.logfmt import decode, encode, gpu, reference, tpu
from tests.pallas_kernels import logfmt_oracle as oracle

INTERPRETED = pltpu.InterpretParams(detect_races=True)


def matrix(shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Heavy-tailed numbers in rows of unlike magnitude; and zeros, a NaN, tiles of one magnitude and of zeros, and
    what lies below the range."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=shape) * 2.0 ** rng.integers(-20, 20, size=(shape[0], 1))
    x[0, 0], x[0, 1], x[1, 7], x[2, :128], x[3, :128], x[4, 5] = 0, -0.0, np.nan, 0, -0.3, 1e-30
    return jnp.asarray(x, dtype)


def assert_kernels_equal(module, x: jax.Array, bits: int, real: bool = False, **how) -> None:
    assert not module.misfit(len(x), x.shape[1], bits, x.dtype)
    codes, ends = module.encode(x, bits, **how)
    back = module.decode(codes, ends, bits, x.shape[1], x.dtype, **how)
    oracle.assert_encoded(np.asarray(x), np.asarray(codes), np.asarray(ends), bits)
    oracle.assert_decoded(np.asarray(x), np.asarray(back), np.asarray(codes), bits)
    if not real:
        want = jax.jit(reference.encode, static_argnums=1)(x, bits)
        again = jax.jit(reference.decode, static_argnums=(2, 3, 4))(codes, ends, bits, x.shape[1], x.dtype)
        for got, expected in zip((codes, ends, back), (*want, again), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(got).astype(np.float32), np.asarray(expected).astype(np.float32))


@pytest.mark.parametrize(("shape", "dtype", "bits"), [
    ((37, 256), jnp.bfloat16, 12), ((5, 1024), jnp.float32, 15)], ids=["chunks of rows", "all planes"])
def test_tpu(shape, dtype, bits):
    assert_kernels_equal(tpu, matrix(shape, dtype), bits, interpret=INTERPRETED)


@pytest.fixture
def real(monkeypatch):
    """Whether there is such a card. With one multiprocessor each of two blocks walks over several squares."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 1)
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield True
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield False


@pytest.mark.parametrize(("shape", "dtype", "bits"), [
    ((136, 416), jnp.bfloat16, 10), ((8, 160), jnp.float32, 15)], ids=["squares in turn", "all planes"])
def test_hopper(real, shape, dtype, bits):
    """Rows and columns end within a square."""
    assert_kernels_equal(gpu, matrix(shape, dtype), bits, real)


@pytest.mark.parametrize(("run", "backend"), [
    (functools.partial(encode, jnp.ones((7, 128)), 8), "hopper"),
    (functools.partial(encode, jnp.ones((8, 120)), 8), "hopper"),
    (functools.partial(encode, jnp.ones((8, 384)), 9), "hopper"),
    (functools.partial(decode, jnp.ones((8, 144), jnp.uint8), jnp.ones((8, 2))), "hopper"),
    (functools.partial(encode, jnp.ones((8, 512)), 9), "tpu"),
    (functools.partial(encode, jnp.ones((8, 100)), 8), "tpu"),
    (functools.partial(encode, jnp.ones((0, 128)), 8), "tpu"),
    (functools.partial(decode, jnp.ones((8, 160), jnp.uint8), jnp.ones((8, 2))), "tpu")])
def test_refuses_what_it_does_not_serve_and_does_it_otherwise(run, backend):
    with pytest.raises(ValueError, match=f"no {backend} kernel"):
        run(backend=backend)
    jax.eval_shape(run)
