"""Rows that an exchange with experts must move over both networks, counted from the router's choices."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.expert_parallel.rounds import Quota, assign_rounds
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.nn.router import choose_experts


class RowsAToken(NamedTuple):
    """Means over tokens, which live on all devices alike."""

    nodes: float
    """That have an expert of it, its own included."""
    slow_copies: float
    """Choices on other nodes."""
    slow_rows: float
    """Other nodes among them: the least that crosses the slow network."""
    fast_rows: float
    """Devices that have an expert of it, beside those where its copies enter their nodes: the least that crosses the
    fast network when what crosses the slow one is least."""


def random_choices(model: ModelConfig, tokens: int, seed: int) -> np.ndarray:
    """int32 [tokens, K]: the model's router, its affinities drawn independently of each other."""
    experts = model.n_routed_experts
    scores_TE = jax.nn.sigmoid(jax.random.normal(jax.random.key(seed), (tokens, experts)))
    return np.asarray(choose_experts(model, scores_TE, jnp.zeros((experts,))).experts_K)


def rows_a_token(experts_TK: np.ndarray, topology: Topology) -> RowsAToken:
    """Means of `rows_of_tokens`."""
    return RowsAToken(*(float(counts_T.mean()) for counts_T in rows_of_tokens(experts_TK, topology)))


def rows_of_tokens(experts_TK: np.ndarray, topology: Topology) -> tuple[np.ndarray, ...]:
    """int [T] for each field of `RowsAToken`, of choices [T, K]; token t lives on device t modulo their number."""
    tokens = len(experts_TK)
    home_T = np.arange(tokens) % topology.devices
    device_TK = experts_TK // topology.experts_per_device
    node_TN = np.zeros((tokens, topology.scale_out), bool)
    device_TM = np.zeros((tokens, topology.devices), bool)
    np.put_along_axis(node_TN, device_TK // topology.scale_up, True, axis=1)
    np.put_along_axis(device_TM, device_TK, True, axis=1)
    own_node_T, own_up_T = home_T // topology.scale_up, home_T % topology.scale_up
    other_node_TN = np.arange(topology.scale_out) != own_node_T[:, None]
    other_up_TM = np.arange(topology.devices) % topology.scale_up != own_up_T[:, None]
    return (node_TN.sum(axis=1), (device_TK // topology.scale_up != own_node_T[:, None]).sum(axis=1),
            (node_TN & other_node_TN).sum(axis=1), (device_TM & other_up_TM).sum(axis=1))


def rounds_needed(experts_TK: np.ndarray, topology: Topology, quota: Quota) -> int:
    """Rounds in which all devices together send choices [T, K] within `quota`; of T tokens each has an equal part."""
    assign = functools.partial(assign_rounds, topology=topology, quota=quota)
    for axis in ("context", "scale_up", "scale_out"):  # mapped axes stand for devices
        assign = jax.vmap(assign, axis_name=axis)
    home_NUTK = experts_TK.reshape(topology.scale_out, topology.scale_up, 1, -1, experts_TK.shape[1])
    return int(np.max(jax.jit(lambda experts: assign(experts).rounds)(home_NUTK)))
