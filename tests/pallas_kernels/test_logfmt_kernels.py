"""The LogFMT kernels beside the search over all values, and beside the reference: interpreted here, looking for races;
the Hopper ones on such a GPU for real, with `pytest --noconftest -o addopts= -k hopper` on this file.

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


def assert_kernels_right(module, x: jax.Array, bits: int, **how) -> None:
    """The reference takes the same steps. Its logarithms and powers may differ in the last place, and did with one of
    two versions of XLA: then a number between two values has the other code, of which the search tells that it is as
    near. With 2^-18 of an error in steps of 2^-10 and more that is one in a hundred at most."""
    assert not module.misfit(len(x), x.shape[1], bits, x.dtype)
    codes, ends = module.encode(x, bits, **how)
    back = module.decode(codes, ends, bits, x.shape[1], x.dtype, **how)
    oracle.assert_encoded(np.asarray(x), np.asarray(codes), np.asarray(ends), bits)
    oracle.assert_decoded(np.asarray(x), np.asarray(back), np.asarray(codes), bits)
    want_codes, want_ends = jax.jit(reference.encode, static_argnums=1)(x, bits)
    assert ends.dtype == want_ends.dtype
    np.testing.assert_array_equal(*(np.asarray(a).astype(np.float32) for a in (ends, want_ends)))
    assert codes.dtype == want_codes.dtype
    assert np.mean(np.asarray(codes) != np.asarray(want_codes)) < 0.01
    again = jax.jit(reference.decode, static_argnums=(2, 3, 4))(codes, ends, bits, x.shape[1], x.dtype)
    assert back.dtype == again.dtype
    np.testing.assert_allclose(*(np.asarray(a).astype(np.float32) for a in (back, again)),
                               rtol=2.0 ** -7 if x.dtype == jnp.bfloat16 else oracle.EPSILON)


@pytest.mark.parametrize(("shape", "dtype", "bits"), [
    ((37, 256), jnp.bfloat16, 12), ((5, 1024), jnp.float32, 15)], ids=["chunks of rows", "all planes"])
def test_tpu(shape, dtype, bits):
    assert_kernels_right(tpu, matrix(shape, dtype), bits, interpret=INTERPRETED)


@pytest.fixture
def on_hopper(monkeypatch):
    """Such a card, or its interpreter. With one multiprocessor each of two blocks walks over several squares."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 1)
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("shape", "dtype", "bits"), [
    ((136, 416), jnp.bfloat16, 10), ((8, 160), jnp.float32, 15)], ids=["squares in turn", "all planes"])
def test_hopper(shape, dtype, bits):
    """Rows and columns end within a square."""
    assert_kernels_right(gpu, matrix(shape, dtype), bits)


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
