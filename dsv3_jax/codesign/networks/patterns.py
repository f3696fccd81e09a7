"""Who sends how many bytes to whom: all-to-all, and an exchange with experts (rings: `nccl`).

Where data is forwarded inside nodes, its two legs are flows of their own that run at the same time, as kernels do who
forward chunk by chunk; all is done when the last leg is.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.codesign.checks import at_least, positive
from dsv3_jax.codesign.networks.routing import Flows
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.topology import Topology


def all_to_all(nodes: int, node_size: int, bytes_each: float) -> Flows:
    """Every GPU of the first `nodes` nodes sends `bytes_each` to every other.

    What goes to another node changes over NVLink to the rail of its target first (NCCL's PXN), and what the GPUs of
    one node have for one GPU elsewhere goes there together.
    """
    at_least(1, nodes=nodes, node_size=node_size)
    positive(bytes_each=bytes_each)
    a, b, rail = (grid.ravel() for grid in np.indices((nodes, nodes, node_size)))
    far = a != b
    node, x, y = (grid.ravel() for grid in np.indices((nodes, node_size, node_size)))
    near = x != y
    size = node_size
    return Flows(np.concatenate([(a * size + rail)[far], (node * size + x)[near]]),
                 np.concatenate([(b * size + rail)[far], (node * size + y)[near]]),
                 np.repeat([size * bytes_each, nodes * bytes_each], [far.sum(), near.sum()]))


def all_pairs(nodes: int, node_size: int, bytes_each: float) -> Flows:
    """The same all-to-all, a flow for each pair of GPUs: `routing.routes` forwards each on its own."""
    at_least(1, nodes=nodes, node_size=node_size)
    positive(bytes_each=bytes_each)
    source, target = (grid.ravel() for grid in np.indices((nodes * node_size,) * 2))
    other = source != target
    return Flows(source[other], target[other], np.full(other.sum(), float(bytes_each)))


def dispatch(experts_TK: np.ndarray, topology: Topology, row_bytes: float, gpu_D: np.ndarray) -> Flows:
    """Rows to experts, one a node: to the GPU of the sender's index there, and by NVLink on to the experts' GPUs.

    Args:
      experts_TK: choices of T tokens; token t lives on device t modulo their number.
      row_bytes: of a token on its way.
      gpu_D: where device d of the group is.
    """
    positive(row_bytes=row_bytes)
    _check_places(gpu_D, topology)
    node_TN, device_TD = sent(experts_TK, topology)
    devices, size = topology.devices, topology.scale_up
    home_T = np.arange(len(experts_TK)) % devices
    rows_DN, rows_DD = np.zeros((devices, topology.scale_out)), np.zeros((devices, devices))
    np.add.at(rows_DN, home_T, node_TN)
    token, device = np.nonzero(device_TD)
    entry = device // size * size + home_T[token] % size
    np.add.at(rows_DD, (entry, device), 1)
    home, node = np.nonzero(rows_DN)
    away = home // size != node
    home, node = home[away], node[away]
    enters, owner = np.nonzero(rows_DD * (1 - np.eye(devices)))
    source = np.concatenate([home, enters])
    target = np.concatenate([node * size + home % size, owner])
    rows = np.concatenate([rows_DN[home, node], rows_DD[enters, owner]])
    return Flows(gpu_D[source], gpu_D[target], rows * row_bytes)


def one_by_one(experts_TK: np.ndarray, topology: Topology, row_bytes: float, gpu_D: np.ndarray) -> Flows:
    """Rows to experts, one a choice, straight to its GPU: DeepEP's low-latency kernels."""
    positive(row_bytes=row_bytes)
    _check_places(gpu_D, topology)
    rows_DD = np.zeros((topology.devices,) * 2)
    home_T = np.arange(len(experts_TK)) % topology.devices
    np.add.at(rows_DD, (home_T[:, None], experts_TK // topology.experts_per_device), 1)
    source, target = np.nonzero(rows_DD * (1 - np.eye(topology.devices)))
    return Flows(gpu_D[source], gpu_D[target], rows_DD[source, target] * row_bytes)


def backwards(flows: Flows, factor: float = 1.0) -> Flows:
    """Every flow the other way, with `factor` times its bytes: a combine, from its dispatch."""
    positive(factor=factor)
    return Flows(flows.target_F, flows.source_F, flows.bytes_F * factor)


def _check_places(gpu_D: np.ndarray, topology: Topology) -> None:
    if len(gpu_D) != topology.devices or len(np.unique(gpu_D)) != len(gpu_D):
        raise ConfigError(f"gpu_D must have a GPU of its own for each of {topology.devices} devices")


def sent(experts_TK: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """bool [T, nodes] and [T, devices]: where a token has experts."""
    device_TK = experts_TK // topology.experts_per_device
    node_TN = np.zeros((len(experts_TK), topology.scale_out), bool)
    device_TD = np.zeros((len(experts_TK), topology.devices), bool)
    np.put_along_axis(node_TN, device_TK // topology.scale_up, True, axis=1)
    np.put_along_axis(device_TD, device_TK, True, axis=1)
    return node_TN, device_TD
