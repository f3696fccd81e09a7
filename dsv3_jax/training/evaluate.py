"""Bits per byte on held-out text: every token but the first predicted exactly once."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh import batch_sharding
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import model_structure
from dsv3_jax.training.batches import validation_windows
from dsv3_jax.training.loss import negative_log_likelihood
from dsv3_jax.training.step import weights_for_compute
from dsv3_jax.training.tokens import TokenSplit


class Evaluator:
    """Evaluates the main model on a whole split, with one compiled program."""

    def __init__(self, config: RunConfig, mesh: Mesh, split: TokenSplit):
        self._mesh, self._split = mesh, split
        self._rows = config.batch.micro_batch
        self._inputs, self._weights = validation_windows(split.tokens, config.batch.sequence_length, 1)
        structure = model_structure(config.model, config.precision)

        def total_nll(params: nnx.State, router_bias: nnx.State, tokens: jax.Array, weights: jax.Array) -> jax.Array:
            model = nnx.merge(structure, weights_for_compute(params, config), router_bias)
            hidden = model(tokens[:, :-1], mtp=False, execution=config.execution).hidden_BTD
            return jnp.sum(negative_log_likelihood(gathered(model.lm_head), hidden, tokens[:, 1:]) * weights)
        self._total_nll = jax.jit(total_nll)

    def __call__(self, params: nnx.State, router_bias: nnx.State) -> dict[str, float]:
        """validation_loss (nats a token) and, if the text is known, validation_bits_per_byte."""
        total = 0.0
        with jax.set_mesh(self._mesh):
            for start in range(0, len(self._inputs), self._rows):
                batch = [self._place(x, start) for x in (self._inputs, self._weights)]
                total += float(self._total_nll(params, router_bias, *batch))
        result = {"validation_loss": total / float(self._weights.sum())}
        if self._split.text_bytes:
            result["validation_bits_per_byte"] = total / math.log(2) / self._split.text_bytes
        return result

    def _place(self, rows: np.ndarray, start: int) -> Any:
        """Rows start..start+micro_batch on the mesh; past the end they are zero, and so is their weight."""
        batch = rows[start:start + self._rows]
        batch = np.concatenate([batch, np.zeros((self._rows - len(batch), rows.shape[1]), rows.dtype)])
        return jax.make_array_from_callback(batch.shape, batch_sharding(self._mesh), lambda index: batch[index])
