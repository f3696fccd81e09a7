"""The routed experts on a mesh, in several rounds, against the same module on one device."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import Execution, MeshConfig
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.block import recomputed
from dsv3_jax.nn.moe import RoutedExperts
from dsv3_jax.nn.router import Routing
from dsv3_jax.presets import MODELS

TINY = dataclasses.replace(MODELS["tiny"], hidden_size=16, moe_intermediate_size=8)


@functools.cache
def _case():
    """Weights, hidden states, a skewed routing and a cotangent: 8 sequences of 8 tokens."""
    rng, shape = np.random.default_rng(0), (8, 8, TINY.num_experts_per_tok)
    keys = rng.gumbel(size=(*shape[:2], TINY.n_routed_experts)) - 0.4 * np.arange(TINY.n_routed_experts)
    routing = Routing(np.argsort(-keys, axis=-1)[..., :shape[2]].astype(np.int32),
                      rng.uniform(0.1, 1, shape).astype(np.float32), np.zeros((), np.float32))
    hidden, cotangent = (rng.normal(size=(*shape[:2], TINY.hidden_size)).astype(np.float32) for _ in range(2))
    graphdef, params = nnx.split(RoutedExperts(dataclasses.replace(TINY, initializer_range=0.3), nnx.Rngs(0)))
    return graphdef, params, hidden, routing, cotangent


@functools.cache
def _plain():
    """Gradients and (result, rounds) on one device."""
    _, params, hidden, routing, _ = _case()
    return jax.tree.map(np.asarray, _gradients(Execution())(params, hidden, routing.weights_K))


def _gradients(execution: Execution):
    """jitted: (params, hidden, weights) -> their gradients, (result, rounds)."""
    graphdef, _, _, routing, cotangent = _case()

    def run(params, hidden, weights):
        return nnx.merge(graphdef, params)(hidden * 1, routing._replace(weights_K=weights), execution)

    def loss(*arguments):
        out, rounds, _ = recomputed(run, execution.recompute)(*arguments)
        return jnp.sum(out.astype(jnp.float32) * cotangent), (out, rounds)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("recompute", "scale_up", "context"), [("none", 4, 1), ("paper", 2, 2), ("full", 4, 1)])
def test_rounds_change_nothing_but_time(recompute, scale_up, context):
    """Float32 sums of the same terms in another order."""
    _, params, hidden, routing, _ = _case()
    arguments = (params, hidden, routing.weights_K)
    plain, (out, rounds) = _plain()
    assert int(rounds) == 1
    with jax.set_mesh(make_mesh(MeshConfig(scale_out=2, scale_up=scale_up, context=context))):
        program = _gradients(Execution(recompute, 1.0)).lower(*arguments).compile()
        grads, (out_in_rounds, rounds) = program(*arguments)
    assert int(rounds) > 1
    np.testing.assert_allclose(out_in_rounds, out, rtol=1e-4, atol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    # One loop of rounds forward and one backward: recomputation does not run the forward's again.
    assert _loops_that_communicate(program.as_text()) == 2


def _loops_that_communicate(text: str) -> int:
    """While loops of a compiled program whose body has an all-to-all."""
    bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    computations = dict(re.findall(r"^%?([\w.\-]+) .*?\{$(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    return sum("all-to-all" in computations[body] for body in bodies)
