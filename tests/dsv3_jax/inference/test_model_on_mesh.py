"""Weights laid out for decoding stay so: a step moves tokens, not weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.forward import decode
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS

MODEL = MODELS["tiny"]


@pytest.mark.parametrize(("spread", "gathers"), [(False, False), (True, True)])
def test_only_weights_that_are_spread_are_gathered_by_a_step(spread, gathers, eight_devices):
    mesh = make_mesh(MeshConfig(data=2, scale_out=2, scale_up=2), jax.devices())
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32", spread=spread)
    prepared = on_mesh.prepare(*split_model(MODEL, 0)[1:])

    @jax.jit
    def step(prepared, tokens):
        model = nnx.merge(on_mesh.structure, prepared)
        cache = LatentCache.empty(MODEL, 8, 4, "float32")
        return decode(model, tokens, cache, None, on_mesh.execution).hidden_BQD
    with jax.set_mesh(mesh):
        text = step.lower(prepared, on_mesh.place(np.zeros((8, 1), np.int32))).compile().as_text()
    assert ("all-gather" in text) == gathers
    assert "all-to-all" in text, "tokens go to their experts"
