"""Tile quantisation by the reference, bit for bit against NumPy."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantise import dequantise, quantise, quantise_both, quantise_transposed, reference, swiglu_quantise
from tests.pallas_kernels import quantise_oracle as oracle

TILES = [(1, 128), (128, 1), (128, 128), None]
SHAPES = [((3, 576), jnp.bfloat16), ((2, 2048), jnp.float32), ((2, 7168), jnp.bfloat16), ((1, 7296), jnp.float32),
          ((1, 1), jnp.float32), ((129, 200), jnp.bfloat16), ((129, 200), jnp.float32), ((300, 127), jnp.bfloat16)]


by_rows = jax.jit(lambda x, power_of_two: quantise(x, (1, 128), power_of_two=power_of_two, backend="reference"),
                  static_argnums=1)


def matrix(shape: tuple[int, ...], dtype=jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Normal numbers, with a magnitude of their own for every row and for every 32 columns: up to 2^13 apart."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-6, 1, size=(*shape[:-1], 1))
    columns = np.repeat(rng.integers(-6, 1, size=-(-shape[-1] // 32)), 32)[:shape[-1]]
    return jnp.asarray(rng.normal(size=shape) * 2.0 ** (rows + columns), dtype)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_equals_the_oracle(shape, dtype):
    x = matrix(shape, dtype)
    cases = list(itertools.product(TILES, (False, True)))

    @jax.jit
    def run(x):
        quantised = [quantise(x, tile, power_of_two=power_of_two, backend="reference") for tile, power_of_two in cases]
        return [(pair, dequantise(*pair, tile)) for pair, (tile, _) in zip(quantised, cases, strict=True)]
    for (tile, power_of_two), (pair, back) in zip(cases, run(x), strict=True):
        values, scales = oracle.quantise(np.asarray(x), tile, power_of_two)
        oracle.assert_same(pair, (values, scales))
        rows, columns = tile or shape
        each = np.repeat(np.repeat(scales, rows, axis=0), columns, axis=1)[:shape[0], :shape[1]]
        np.testing.assert_array_equal(back, values.astype(np.float32) * each)
        # Half a unit in the last of 3 fraction bits, or half the smallest subnormal, and the inverse's own rounding.
        error, x_MK = np.abs(np.asarray(back) - np.asarray(x, np.float32)), np.asarray(x, np.float32)
        assert (error <= np.maximum(np.abs(x_MK) * 2.0 ** -4, each * 2.0 ** -10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(200, 576), (128, 128), (1, 5)], ids=str)
def test_transposes_equal_the_oracle(shape, power_of_two):
    x = matrix(shape)
    rows, columns = (oracle.quantise(a, (1, 128), power_of_two) for a in (np.asarray(x), np.asarray(x).T))
    down = oracle.quantise(np.asarray(x), (128, 1), power_of_two)
    np.testing.assert_array_equal(columns[1], down[1].T)

    @jax.jit
    def run(x):
        how = {"power_of_two": power_of_two, "backend": "reference"}
        return *quantise_both(x, **how), quantise_transposed(x, **how)
    for got, want in zip(run(x), (rows, columns, columns), strict=True):
        oracle.assert_same(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_swiglu_is_the_two_steps(dtype):
    """Equal to the bit to the product rounded and quantised; the product itself within a unit in its last place."""
    gate_up = 8 * matrix((7, 2 * 576), dtype)
    product = jax.jit(reference.swiglu)(gate_up)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    np.testing.assert_allclose(np.asarray(product, np.float64), gate / (1 + np.exp(-gate)) * up,
                               rtol=2 ** -8 if dtype == jnp.bfloat16 else 1e-6)
    want = oracle.quantise(np.asarray(product), (1, 128), False)
    oracle.assert_same(jax.jit(functools.partial(swiglu_quantise, backend="reference"))(gate_up), want)


@pytest.mark.parametrize("tile", [(1, 128), None], ids=str)
def test_leading_dimensions_are_batches(tile):
    x = matrix((2, 3, 130, 140))
    values, scales = jax.jit(functools.partial(quantise, tile=tile, backend="reference"))(x)
    for at in np.ndindex(2, 3):
        oracle.assert_same((values[at], scales[at]), oracle.quantise(np.asarray(x[at]), tile, False))
    assert dequantise(values, scales, tile, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("magnitude", [0, 1e-28, 1e-36, 2.0 ** -126, 1e-4, 448, 3e38])
def test_every_magnitude(magnitude, power_of_two):
    """From the smallest normal number, whose scale is at its lower bound, to the largest; and zeros."""
    x = magnitude * np.random.default_rng(0).uniform(0.25, 1, size=(4, 256)).astype(np.float32)
    x[:, ::128] = magnitude
    # Subnormal magnitudes count as zero or not, as the machine does.
    x[np.abs(x) < 2.0 ** -126] = 0
    values, scales = by_rows(jnp.asarray(x), power_of_two)
    oracle.assert_same((values, scales), oracle.quantise(x, (1, 128), power_of_two))
    assert np.isfinite(1 / np.asarray(scales)).all()
    assert np.isfinite(np.asarray(dequantise(values, scales, (1, 128)))).all()


def test_power_of_two_on_both_sides_of_every_boundary():
    """A tile of one number: 448 * 2^k, and the float32 before and after it."""
    limits = np.float32(448) * 2.0 ** np.arange(-134, 119).astype(np.float32)
    x = np.stack([np.nextafter(limits, 0), limits, np.nextafter(limits, np.inf)]).astype(np.float32)
    _, scales = by_rows(jnp.asarray(x.reshape(-1, 1)), True)
    want = [oracle.scale_of(number, True) for number in x.reshape(-1, 1)]
    np.testing.assert_array_equal(scales[:, 0], want)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_a_tile_with_inf_or_nan_is_nan(bad, power_of_two):
    x = np.ones((2, 384), np.float32)
    x[0, 130] = bad
    values, scales = by_rows(jnp.asarray(x), power_of_two)
    oracle.assert_same((values, scales), oracle.quantise(x, (1, 128), power_of_two))
    expected = np.zeros_like(x, bool)
    expected[0, 128:256] = True
    np.testing.assert_array_equal(np.isnan(values.astype(jnp.float32)), expected)
    np.testing.assert_array_equal(np.isnan(dequantise(values, scales, (1, 128))), expected)


def test_tiles_of_zeros_keep_a_usual_scale():
    (_, scales), (_, powers) = (by_rows(jnp.zeros((1, 128)), power_of_two) for power_of_two in (False, True))
    np.testing.assert_array_equal(scales, np.float32(1e-4) * np.float32(1 / 448))
    assert powers[0, 0] == 2.0 ** -22  # 1e-4 / 448 = 2.2e-7 lies between 2^-23 and 2^-22


def test_the_inverse_is_the_nearest_whatever_division_gives():
    """Guesses two units off in either direction; powers of two, their neighbours, and random numbers."""
    rng = np.random.default_rng(0)
    numbers = np.ldexp(rng.uniform(1, 2, 20_000), rng.integers(-126, 119, 20_000)).astype(np.float32)
    powers = np.float32(2) ** np.arange(-125, 119).astype(np.float32)
    numbers = np.concatenate([numbers, powers, np.nextafter(powers, 0), np.nextafter(powers, np.inf)])
    exact = np.float32(1) / numbers
    for off in range(-2, 3):
        guess = (exact.view(np.int32) + off).view(np.float32)
        np.testing.assert_array_equal(jax.jit(reference.nearest_inverse)(numbers, guess), exact)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_rounding_has_no_bias(tile):
    """Of n numbers that are no e4m3 numbers, half are rounded down, within 10/sqrt(n)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)

    def run(x):
        values, scales = quantise(x, tile, backend="reference")
        return (values, scales), reference.spread(scales, tile, x.shape)
    (values, _), each = jax.jit(run)(x)
    scaled = np.asarray(x, np.float64) / np.asarray(each, np.float64)
    error = np.asarray(values, np.float64) - scaled
    moved = np.abs(error) > 1e-5
    assert abs(np.mean(error[moved] < 0) - 0.5) < 10 / np.sqrt(moved.sum())


def test_the_oracle_rounds_to_the_nearest():
    """By search over all codes, with the even one on ties."""
    codes = np.arange(127, dtype=np.uint8)
    numbers = codes.view(oracle.E4M3).astype(np.float64)
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, ties, np.random.default_rng(0).uniform(0, 448, 1000)]).astype(np.float32)
    distance = np.abs(x[:, None] - numbers)
    nearest = np.argmin(distance + 1e-12 * (codes % 2), axis=1)
    np.testing.assert_array_equal(x.astype(oracle.E4M3).view(np.uint8), codes[nearest])


def test_no_rows():
    values, scales = quantise(jnp.zeros((0, 256), jnp.bfloat16), (1, 128))
    assert (values.shape, scales.shape) == ((0, 256), (0, 2))


@pytest.mark.parametrize(("run", "message"), [
    (functools.partial(quantise, jnp.ones((4, 4)), (1, 64)), "tile"),
    (functools.partial(quantise, jnp.ones((4, 4), jnp.float16), (1, 128)), "float16"),
    (functools.partial(quantise, jnp.ones(4), (1, 128)), "not float32"),
    (functools.partial(swiglu_quantise, jnp.ones((4, 5))), "odd")])
def test_says_what_it_does_not_take(run, message):
    with pytest.raises(ValueError, match=message):
        run()
