"""A backward in two parts: together the whole, the products for weights in the second, nothing kept in vain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.deferral import all_at_once, apart, later, split
from dsv3_jax.precision.linear import linear, swiglu_linear
from dsv3_jax.precision.recipe import RECIPES

LAYERS, ROWS, WIDTH = 3, 4, 8


def stack(recompute):
    def layer(hidden, weights):
        gain, matrix = weights
        return hidden + jnp.tanh(linear(hidden * gain, matrix, None)), None

    def run(weights, hidden):
        return jax.lax.scan(jax.checkpoint(layer) if recompute else layer, hidden, weights)[0]
    return run


def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    return ((1 + jax.random.normal(keys[0], (LAYERS, WIDTH)) / 8, jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH))),
            jax.random.normal(keys[2], (ROWS, WIDTH)), jax.random.normal(keys[3], (ROWS, WIDTH)))


def backward_of(function, weights, hidden):
    """(backward of flat arrays, what it reads besides the gradient)."""
    _, pull = jax.vjp(function, weights, hidden)
    leaves, tree = jax.tree.flatten(pull)
    return lambda gradient, *leaves: jax.tree.leaves(jax.tree.unflatten(tree, leaves)(gradient)), leaves


def in_halves(halves, *inputs):
    first = halves.first(*inputs)
    early = len(halves.early)
    late = iter(halves.second(*first[early:], *(inputs[place] for place in halves.reads)))
    outputs = dict(zip(halves.early, first, strict=False))
    return [outputs[place] if place in outputs else next(late) for place in range(3)], first[early:]


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_both_parts_are_the_whole(recompute):
    weights, hidden, gradient = operands()
    backward, kept = backward_of(stack(recompute), weights, hidden)
    halves = split(backward, gradient, *kept)
    got, between = in_halves(halves, gradient, *kept)
    for one, other in zip(got, backward(gradient, *kept), strict=True):
        np.testing.assert_array_equal(one, other)
    # The gains' gradients and the hidden's come first; the matrices' take the layers' inputs and gradients.
    assert halves.early == (0, 2)
    assert {x.shape for x in between} == {(LAYERS, ROWS, WIDTH)}
    assert not any(kept[place - 1].shape == (LAYERS, WIDTH, WIDTH) for place in halves.reads if place)


def test_products_for_weights_are_in_the_second_part():
    weights, hidden, gradient = operands()
    backward, kept = backward_of(stack(recompute=False), weights, hidden)
    halves = split(backward, gradient, *kept)
    _, between = in_halves(halves, gradient, *kept)
    second = products(halves.second, *between, *((gradient, *kept)[place] for place in halves.reads))
    assert (products(halves.first, gradient, *kept), second) == (1, 1)


def test_a_backward_that_is_not_split_has_no_marks():
    weights, hidden, gradient = operands()
    backward, kept = backward_of(stack(recompute=False), weights, hidden)
    assert "later" not in str(jax.make_jaxpr(backward)(gradient, *kept))


def test_what_is_not_marked_comes_first():
    def backward(x):
        marked = later(x) * 2
        with all_at_once():
            return [marked, later(x) * 3]
    assert split(backward, jnp.ones(3)).early == (1,)


def test_constants_are_made_again():
    halves = split(lambda x: [jnp.zeros((100,)).at[:3].add(later(x))], jnp.ones(3))
    first = halves.first(jnp.ones(3))
    assert first == []
    np.testing.assert_array_equal(halves.second(jnp.ones(3))[0][:4], [1, 1, 1, 0])


def test_weights_are_read_and_not_passed_on():
    """Also out of a recomputed function, of which partial evaluation makes everything a result that is read later."""
    @jax.checkpoint
    def body(weight, x):
        return weight * later(x)

    def backward(weight, x):
        return [body(weight, x)]
    halves = split(backward, jnp.ones((5, 5)), jnp.ones((5, 5)))
    assert halves.first(jnp.ones((5, 5)), jnp.ones((5, 5))) == []
    assert sorted(halves.reads) == [0, 1]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("product", [linear, swiglu_linear])
def test_layers_mark_their_weights(precision, product):
    """In every precision: of a layer's gradients that of the weight is late, and only that."""
    recipe = RECIPES[precision].linear if product is linear else RECIPES[precision].down
    x = jnp.ones((128, 256 if product is linear else 512), jnp.bfloat16)
    weight = jnp.ones((256, 128), jnp.bfloat16)
    backward, kept = backward_of(lambda weight, x: product(x, weight, recipe), weight, x)
    assert split(backward, jnp.ones((128, 128), jnp.bfloat16), *kept).early == (1,)


@jax.custom_vjp
def penalty(weights):
    return jnp.sum(weights ** 2)


penalty.defvjp(lambda weights: (penalty(weights), weights), lambda weights, g: (apart(2 * g * weights),))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_an_addend_comes_early_and_by_itself(recompute):
    def run(weights, hidden):
        return jnp.tanh(linear(hidden, weights, None)) + penalty(weights)
    _, hidden, gradient = operands()
    weights = operands()[0][1][0]
    backward, kept = backward_of(jax.checkpoint(run) if recompute else run, weights, hidden)
    halves = split(backward, gradient, *kept)
    assert sorted(halves.early) == [0, 1]
    assert halves.late == (0,)
    first = halves.first(gradient, *kept)
    early = dict(zip(halves.early, first, strict=False))
    (late,) = halves.second(*first[2:], *((gradient, *kept)[place] for place in halves.reads))
    d_weights, d_hidden = backward(gradient, *kept)
    np.testing.assert_array_equal(early[1], d_hidden)
    np.testing.assert_array_equal(early[0], 2 * jnp.sum(gradient) * weights)
    np.testing.assert_allclose(early[0] + late, d_weights, rtol=1e-6)


def test_an_addend_that_is_more_is_refused():
    _, hidden, gradient = operands()
    weights = operands()[0][1][0]
    backward, kept = backward_of(lambda weights, hidden: linear(hidden, weights, None) + penalty(3 * weights), weights,
                                 hidden)
    with pytest.raises(ValueError, match="more than an addend"):
        split(backward, gradient, *kept)
