"""The quantised linear layer: three products, each of operands quantised for it, and what the backward keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.accumulator import hopper_matmul
from dsv3_jax.precision.linear import linear, swiglu_linear
from dsv3_jax.precision.quantised import BLOCK, COLUMN, ROW, Carried, Quantised, QuantisedE5M6
from dsv3_jax.precision.recipe import RECIPES, Cast

FP8 = RECIPES["fp8"]
RECIPES_TESTED = {"linear": FP8.linear, "after attention": FP8.after_attention, "up": FP8.up, "down": FP8.down,
                  "one scale a tensor": RECIPES["fp8_tensor_scales"].linear,
                  "gradients in blocks": RECIPES["fp8_gradient_blocks"].linear}
NO_PROMOTION = RECIPES["fp8_no_promotion"].linear


def _read(x, cast):
    """The numbers that a product reads, float64."""
    return np.asarray(Quantised.of(jnp.asarray(x), cast.tile, cast.power_of_two).dequantise(), np.float64)


def _operands(shape, groups=1, dtype=jnp.float32):
    """x, W and dy whose columns and rows differ in size by up to 2^8, so that scales matter."""
    (rows, width, inner), rng = shape, np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) * 2.0 ** rng.integers(-4, 5, size=shape[-1]), dtype)
    return drawn(rows, width), drawn(*([groups] if groups > 1 else []), width, inner), drawn(rows, inner)


def _close(got, want, tolerance=1e-6):
    """float32 sums of a few hundred terms, relative to the largest result."""
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max(initial=0))


@pytest.mark.parametrize("shape", [(256, 256, 128), (200, 144, 96)], ids=["whole tiles", "partial tiles"])
@pytest.mark.parametrize("name", RECIPES_TESTED)
def test_products_of_what_the_recipe_reads(name, shape):
    recipe = RECIPES_TESTED[name]
    x, w, dy = _operands(shape)
    out, pull = jax.vjp(lambda x, w: linear(x, w, recipe), x, w)
    dx, dw = pull(dy)
    kept = {"input_of_wgrad": x, "input": _read(x, recipe.input), "e5m6": QuantisedE5M6.of(x).dequantise()}[recipe.kept]
    x_of_wgrad = _read(np.asarray(kept, np.float32), recipe.input_of_wgrad)
    _close(out, _read(x, recipe.input) @ _read(w, recipe.weight))
    _close(dx, _read(dy, recipe.gradient) @ _read(w, recipe.weight).T)
    _close(dw, x_of_wgrad.T @ _read(dy, recipe.gradient_of_wgrad))


@pytest.mark.parametrize("name", [name for name in RECIPES_TESTED if name != "one scale a tensor"])
def test_groups_are_matrices_of_their_own(name):
    """With an empty group and rows past the last, which count for nothing."""
    recipe, sizes = RECIPES_TESTED[name], [128, 0, 256]
    x, w, dy = _operands((512, 256, 128), groups=3)
    x, dy = x.at[384:].set(0), dy.at[384:].set(0)

    def run(x, w):
        return linear(x, w, recipe, group_sizes_E=jnp.asarray(sizes, jnp.int32), alignment=128)
    out, pull = jax.vjp(run, x, w)
    dx, dw = pull(dy)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        alone, pull_alone = jax.vjp(lambda x, w: linear(x, w, recipe), x[part], w[group])
        for got, want in zip((out[part], dx[part], dw[group]), (alone, *pull_alone(dy[part])), strict=True):
            _close(got, np.asarray(want, np.float64) if size else np.zeros(got.shape))
        start += size
    assert not np.any(out[384:])
    assert not np.any(dx[384:])


def test_sums_without_promotion_lose_what_the_tensor_cores_cut_off():
    """Every product is the simulated one of what its operands read, with groups and without."""
    x, w, dy = _operands((384, 256, 128), groups=2)
    sizes = jnp.asarray([256, 0], jnp.int32)
    x, dy = x.at[256:].set(0), dy.at[256:].set(0)
    out, pull = jax.vjp(lambda x, w: linear(x, w, NO_PROMOTION, group_sizes_E=sizes, alignment=128), x, w)
    alone, pull_alone = jax.vjp(lambda x, w: linear(x, w, NO_PROMOTION), x[:256], w[0])
    (dx, dw), (dx_alone, dw_alone) = pull(dy), pull_alone(dy[:256])
    for got, want in ((out[:256], alone), (dx[:256], dx_alone), (dw[0], dw_alone)):
        np.testing.assert_array_equal(got, want)
    assert not np.any(out[256:])
    assert not np.any(dw[1])
    sources = {"input": x, "weight": w[0], "gradient": dy, "input_of_wgrad": x, "gradient_of_wgrad": dy}
    read = {name: _read(source, getattr(NO_PROMOTION, name)).astype(np.float32) for name, source in sources.items()}
    operands = ((alone, read["input"][:256], read["weight"]), (dx_alone, read["gradient"][:256], read["weight"].T),
                (dw_alone, read["input_of_wgrad"][:256].T, read["gradient_of_wgrad"][:256]))
    for got, left, right in operands:
        np.testing.assert_array_equal(got, hopper_matmul(left, right, promote_every=None))
        exact = left.astype(np.float64) @ right
        assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 1e-2  # 14 bits, 256 terms; float32 has 24


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_in_float8_give_the_same_result(groups):
    """Transposed in blocks, as inference holds them."""
    x, w, _ = _operands((384, 200, 144), groups)
    sizes = {} if groups == 1 else {"group_sizes_E": jnp.asarray([128, 0, 256], jnp.int32), "alignment": 128}
    held = Quantised.of(w, BLOCK).transposed
    for product, inputs in ((linear, x), (swiglu_linear, jnp.concatenate([x, x[::-1]], axis=1))):
        np.testing.assert_array_equal(product(inputs, held, FP8.linear, **sizes),
                                      product(inputs, w, FP8.linear, **sizes))


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_in_float8_give_the_same_result(groups):
    """Cast before, as dispatch sends them; the gradient is the carrier's. The weight may be in float8 as well."""
    recipe = FP8.up
    x, w, dy = _operands((384, 256, 128), groups)
    sizes = {} if groups == 1 else {"group_sizes_E": jnp.asarray([128, 0, 256], jnp.int32), "alignment": 128}
    sent = Carried.of(Quantised.of(x, recipe.input.tile, recipe.input.power_of_two), x.dtype)
    out, pull = jax.vjp(lambda carrier, w: linear(Carried(sent.quantised, carrier), w, recipe, **sizes),
                        sent.carrier, w)
    expected, pull_expected = jax.vjp(lambda x, w: linear(x, w, recipe, **sizes), x, w)
    for got, want in zip((out, *pull(dy)), (expected, *pull_expected(dy)), strict=True):
        np.testing.assert_array_equal(got, want)
    held = Quantised.of(w, recipe.weight.tile).transposed
    np.testing.assert_array_equal(linear(sent, held, recipe, **sizes), expected)


@pytest.mark.parametrize(("product", "recipe", "carried", "held", "message"), [
    (linear, None, True, False, r"x_MK \(Carried\).* recipe \(None\).*: give a recipe"),
    (linear, None, False, True, r"weight \(Quantised\).* recipe \(None\).*: give a recipe, or weight\.transposed"),
    (linear, FP8.linear, True, False, r"x_MK \(Carried\).* recipe\.kept \('input_of_wgrad'\).*: give a recipe"),
    (linear, FP8.after_attention, True, True, r"x_MK \(Carried\).* recipe\.kept \('e5m6'\).*: give a recipe"),
    (swiglu_linear, None, False, True, r"weight \(Quantised\).* recipe \(None\)"),
    (swiglu_linear, FP8.up, True, False, r"gate_up_M2K \(Carried\).*: give it in bf16 or float32")])
def test_float8_that_is_not_read_so_is_refused(product, recipe, carried, held, message):
    x, w, _ = _operands((128, 256, 128))
    x = Carried.of(Quantised.of(x, ROW), x.dtype) if carried else x
    w = Quantised.of(w, BLOCK).transposed if held else w
    with pytest.raises(TypeError, match=message):
        product(x, w, recipe)


def test_swiglu_is_computed_again_from_float8():
    """Its output in the forward comes from the input as it is; in the backward from what was kept of it."""
    recipe = FP8.down
    h, w, _ = _operands((256, 512, 128))
    h, w = h / 8, w[:256]
    dy = _operands((256, 256, 128))[2]
    out, pull = jax.vjp(lambda h, w: swiglu_linear(h, w, recipe), h, w)
    dh, dw = pull(dy)
    again = Quantised.of(h, ROW).dequantise()

    def silu_times_up(h):
        gate, up = np.split(np.asarray(h, np.float64), 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up
    _close(out, _read(silu_times_up(h).astype(np.float32), recipe.input) @ _read(w, recipe.weight))
    _close(dw, _read(silu_times_up(again).astype(np.float32), Cast(COLUMN)).T @ _read(dy, recipe.gradient_of_wgrad))
    d_inner = _read(dy, recipe.gradient) @ _read(w, recipe.weight).T
    gate, up = np.split(np.asarray(again, np.float64), 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    _close(dh, np.concatenate([d_inner * up * sigmoid * (1 + gate * (1 - sigmoid)), d_inner * gate * sigmoid], axis=-1))


@pytest.mark.parametrize(("part", "bytes_a_value"), [("linear", 1), ("after_attention", 1.5), ("up", 1), ("down", 2)])
def test_bytes_that_the_backward_keeps(part, bytes_a_value):
    """Of x [512, 256] in bf16: float8, 12 bits of E5M6, or float8 of SwiGLU's input, which is twice as wide; each with
    a float32 scale for 128 values. And the weight, which is not copied."""
    product = swiglu_linear if part == "down" else linear
    x, w, _ = _operands((512, 512 if part == "down" else 256, 128), dtype=jnp.bfloat16)
    w = w[:256]
    _, pull = jax.vjp(lambda x, w: product(x, w, getattr(FP8, part)), x, w)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    scales = 4 / 128 * (2 if part == "down" else 1)
    assert held == 512 * 256 * (bytes_a_value + scales) + w.nbytes
