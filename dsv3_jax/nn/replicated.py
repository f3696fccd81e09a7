"""DeepSeekMoE in serving, where devices hold more experts than the model has (paper 2, section 3.4).

S slots hold E experts, some of them several times. The router, its node limit and its weights are about experts; which
slot of an expert computes a token is chosen after that, and the exchange knows slots only. Where replicas lie is state:
another placement is other arrays in the same program.

Dimensions here besides the project's: H devices that tokens come from (home), R the most replicas an expert may have.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.config import Execution
from dsv3_jax.expert_parallel.permutation import group_counts
from dsv3_jax.expert_parallel.replica_choice import choose_replicas
from dsv3_jax.mesh import DEVICES, TOKENS, on_each_device
from dsv3_jax.nn.moe import MixtureOfExperts


class ReplicaTable(nnx.Variable):
    """Where replicas lie."""


class TokenNumbers(NamedTuple):
    """What the choice of replicas knows of tokens."""

    number_BT: jax.Array
    """int32: see `choose_replicas`."""
    real_BT: jax.Array
    """bool: padding goes to no expert and is not counted."""


class ReplicatedExperts(nnx.Module):
    """A mixture of experts whose experts are in slots.

    Args:
      moe: its experts' weights by slot, [S, ...].
      replicas_E: a layer's `Placement.replicas_LE`.
      replica_slots_ER: a layer's `Placement.replica_slots_LER`.
      slots: S, on all devices.
      anywhere: whether an expert's replicas may be on different nodes.
    """

    def __init__(self, moe: MixtureOfExperts, replicas_E: jax.Array, replica_slots_ER: jax.Array, slots: int,
                 anywhere: bool):
        self.moe = moe
        moe.experts.slots = slots
        self.replicas_E = ReplicaTable(replicas_E, axes=("router",))
        self.replica_slots_ER = ReplicaTable(replica_slots_ER, axes=("router", "replica"))
        if anywhere:
            moe.experts.reach = moe.config.num_experts_per_tok

    def __call__(self, hidden_BTD: jax.Array, tokens: TokenNumbers,
                 execution: Execution) -> tuple[jax.Array, jax.Array]:
        """[B, T, D] -> ([B, T, D], int32 [H, S], tokens that each device has sent to each slot)."""
        routing = self.moe.gate(hidden_BTD)
        slots_BTK, sent_HS = self._in_slots(routing.experts_K, tokens)
        out_BTD = self.moe.experts(hidden_BTD, routing._replace(experts_K=slots_BTK), execution)[0]
        if self.moe.config.n_shared_experts:
            out_BTD += self.moe.shared_experts(hidden_BTD)
        return out_BTD, sent_HS

    def _in_slots(self, experts_BTK: jax.Array, tokens: TokenNumbers) -> tuple[jax.Array, jax.Array]:
        """The slots of the experts that tokens chose, and how many tokens each device has for each."""
        slots = self.moe.experts.slots

        def local(experts_BTK: jax.Array, tokens: TokenNumbers, *tables: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen_BTK = jnp.where(tokens.real_BT[..., None], experts_BTK, -1)
            slots_TK = choose_replicas(chosen_BTK.reshape(-1, chosen_BTK.shape[-1]), tokens.number_BT.reshape(-1),
                                       *tables)
            return slots_TK.reshape(chosen_BTK.shape), group_counts(slots_TK, slots)[None]
        whole = PartitionSpec()
        with jax.named_scope("replicas"):
            return on_each_device(local, (TOKENS, TOKENS, whole, whole), (TOKENS, DEVICES))(
                experts_BTK, tokens, self.replicas_E[...], self.replica_slots_ER[...])
