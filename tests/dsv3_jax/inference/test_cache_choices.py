"""A generator that drafts tokens on a ring of few entries."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.weights import model_from_oracle

# Two prediction modules, whose drafts random weights reject: each step goes back on entries of a ring of 3 + 2.
CONFIG = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2, num_nextn_predict_layers=2, attention="mqa",
                             head_dim=16, attention_window=3)
PROMPTS = [np.array(p) for p in ([5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9])]


def test_speculation_on_a_ring_makes_the_text_of_the_forward_pass():
    """Greedy, so every token is the likeliest after all before it, by the training forward with the window's mask."""
    model = model_from_oracle(CONFIG, oracle.random_weights(CONFIG, seed=2))
    weights = nnx.split(model, nnx.Param, RouterBias)[1:]
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    generator = Generator(CONFIG, mesh, precision="float32", speculative=True)
    generation = generator.generate(generator.prepare(*weights), PROMPTS, 20, Sampling(temperature=0))
    made = generation.run()
    assert generation.acceptance < 0.9, "rejected drafts are what this is about"
    texts = np.zeros((len(PROMPTS), 32), np.int32)
    for row, (prompt, new) in enumerate(zip(PROMPTS, made, strict=True)):
        texts[row, :len(prompt) + 20] = [*prompt, *new]
    logits = np.asarray(jax.jit(lambda t: model.logits(model(t, mtp=False).hidden_BTD))(texts))
    for row, (prompt, new) in enumerate(zip(PROMPTS, made, strict=True)):
        assert new == logits[row, len(prompt) - 1:len(prompt) + 19].argmax(axis=-1).tolist()
