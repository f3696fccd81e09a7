"""How evenly an engine's devices are loaded with experts' work, and the placement that follows it.

    L  MoE layers, the prediction modules' last      M  devices that share the experts
    E  experts                                       H  devices that tokens come from, those that share a batch
    S  slots
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.expert_parallel.rebalancing import rebalanced, transfers
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.expert_slots import LayerMover
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.paged_storage import ROWS

KEPT = 0.5
"""Of the load measured before a rebalance, what counts in the next: a load that drifts is followed, and a short time
between two does not decide alone."""


class Rebalance(NamedTuple):
    """What a rebalance did."""

    before_L: np.ndarray
    """The fullest device's load over the mean, as measured since the last."""
    expected_L: np.ndarray
    """The same with the new placement, if replicas share evenly what has been measured."""
    layers: int
    """That changed."""
    replicas: int
    """That came to a device which did not have them."""
    moved_bytes: int
    """Of their weights."""
    between_nodes_bytes: int
    """Of these, what had to come from another node."""
    seconds: float


def imbalance(load_LM: np.ndarray) -> np.ndarray:
    """[L]: the fullest device's load over the mean; 1 where there is none."""
    mean_L = load_LM.mean(axis=1)
    return np.where(mean_L > 0, load_LM.max(axis=1) / np.where(mean_L > 0, mean_L, 1), 1.0)


class ExpertBalance:
    """What an engine knows of its experts.

    Args:
      weights: of `ModelOnMesh.prepare`.
      sent_HLS: the counters of the engine's state.

    Attributes:
      placement: as the weights are now.
      load_LE: float64, tokens of each expert, older ones counting less.
      device_LM: float64, tokens that each device's slots got since the last rebalance.
      programs: how many it has compiled.
    """

    def __init__(self, on_mesh: ModelOnMesh, weights: nnx.State, sent_HLS: jax.Array):
        assert on_mesh.placement is not None
        self.placement: Placement = on_mesh.placement
        self._mover = LayerMover(on_mesh.model, on_mesh.mesh, weights)
        layers, deployment = len(self.placement.expert_LS), self.placement.deployment
        self.load_LE = np.zeros((layers, deployment.experts))
        self.device_LM = np.zeros((layers, deployment.devices))
        with jax.set_mesh(on_mesh.mesh):
            drain: Any = jax.jit(lambda sent_HLS: (jnp.zeros_like(sent_HLS), jnp.sum(sent_HLS, axis=0)),
                                 donate_argnums=0, out_shardings=tuple(
                                     NamedSharding(on_mesh.mesh, spec) for spec in (ROWS, PartitionSpec())))
            self._drain = drain.lower(sent_HLS).compile()
        self.programs = len(self._mover.compiled) + 1

    def measure(self, sent_HLS: jax.Array) -> jax.Array:
        """Takes over what the counters hold; gives them back empty."""
        sent_HLS, counted = self._drain(sent_HLS)
        sent_LS = np.asarray(counted, np.float64)
        for load_E, expert_S, sent_S in zip(self.load_LE, self.placement.expert_LS, sent_LS, strict=True):
            np.add.at(load_E, expert_S, sent_S)
        self.device_LM += sent_LS.reshape(*self.device_LM.shape, -1).sum(axis=2)
        return sent_HLS

    def improved(self, tolerance: float) -> Placement:
        """For the load measured so far; see `rebalanced`. Takes milliseconds a layer."""
        return rebalanced(self.load_LE, self.placement, tolerance)

    def begin_anew(self) -> None:
        """A rebalance is decided: what is measured from now on is measured of the next."""
        self.load_LE *= KEPT
        self.device_LM[:] = 0

    def move(self, weights: nnx.State, layer: int, new: Placement) -> nnx.State:
        """The weights with one layer as the new placement has it. The counters must have been emptied just before."""
        weights = self._mover.move(weights, layer, self.placement, new)
        expert_LS = self.placement.expert_LS.copy()
        expert_LS[layer] = new.expert_LS[layer]
        self.placement, self.device_LM[layer] = self.placement._replace(expert_LS=expert_LS), 0
        return weights

    def report(self, new: Placement, seconds: float = 0.0) -> Rebalance:
        """What a rebalance to that placement will do, as of now."""
        moves = transfers(new, self.placement)
        inside, between = moves.bytes_sent(self._mover.expert_bytes)
        changed_L = np.any(new.expert_LS != self.placement.expert_LS, axis=1)
        return Rebalance(imbalance(self.device_LM), imbalance(new.device_load(self.load_LE)), int(changed_L.sum()),
                         len(moves.layer_X), int(inside + between), int(between), seconds)

