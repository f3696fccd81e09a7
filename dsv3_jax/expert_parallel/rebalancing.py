"""From one placement of experts to the next while a model serves: few moves, and only such as are worth it.

Devices are alike, and so are nodes, and the slots of a device: a new placement may be turned round so that devices keep
as much of what they hold as possible (`arranged`). What they lack then comes from a device that has it (`transfers`).
And often a few changes of the old placement do as well as a new one, or none do (`rebalanced`).

Dimensions are those of `replicas`, and X transfers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel import replica_search as search
from dsv3_jax.expert_parallel.replicas import Deployment, Placement, checked_loads, lower_bound, place


class Transfers(NamedTuple):
    """Experts' weights that devices are sent, int32 [X] each, by layer and slot.

    All sources hold what they send in the old placement, so a slot may only be written when all that it is to send has
    been sent.
    """

    layer_X: np.ndarray
    expert_X: np.ndarray
    source_X: np.ndarray
    """A device on the destination's node if one there has the expert; of several, one that sends least."""
    destination_X: np.ndarray
    """A device."""
    slot_X: np.ndarray
    """Of the new placement, on the destination."""
    between_nodes_X: np.ndarray
    """bool."""

    def bytes_sent(self, expert_bytes: float) -> tuple[float, float]:
        """Inside nodes, and between them; `expert_bytes` are those of one expert of one layer."""
        between = float(np.sum(self.between_nodes_X)) * expert_bytes
        return len(self.layer_X) * expert_bytes - between, between


def arranged(new: Placement, old: Placement) -> Placement:
    """The new placement with its devices and slots exchanged so that fewest replicas have to be sent; and of these,
    fewest between nodes.

    By group, devices change places inside their node, and whole nodes with each other. Else any device may take any
    other's place, which leaves the loads of devices as they are, but not those of nodes.

    Raises:
      ConfigError: the two aren't of one deployment and equally many layers.
    """
    _check_alike(new, old)
    layers = [_arranged_layer(new_MP, old_MP, new.deployment)
              for new_MP, old_MP in zip(new.expert_LMP, old.expert_LMP, strict=True)]
    return new._replace(expert_LS=np.stack(layers).reshape(old.expert_LS.shape))


def transfers(new: Placement, old: Placement) -> Transfers:
    """What each device must be sent to hold the new placement in place of the old.

    Raises:
      ConfigError: the two aren't of one deployment and equally many layers.
    """
    _check_alike(new, old)
    per_device, per_node = new.deployment.slots_per_device, new.deployment.devices_per_node
    sends_M, rows = np.zeros(new.deployment.devices, int), []
    for layer, (new_S, old_MP) in enumerate(zip(new.expert_LS, old.expert_LMP, strict=True)):
        has_ME = search.has(old_MP, new.deployment.experts)
        device_S = np.arange(len(new_S)) // per_device
        for slot in np.flatnonzero(~has_ME[device_S, new_S]):
            holders = np.flatnonzero(has_ME[:, new_S[slot]])
            near = holders[holders // per_node == device_S[slot] // per_node]
            candidates = near if len(near) else holders
            source = candidates[np.argmin(sends_M[candidates])]
            sends_M[source] += 1
            rows.append((layer, new_S[slot], source, device_S[slot], slot))
    layer_X, expert_X, source_X, destination_X, slot_X = np.array(rows, np.int32).reshape(-1, 5).T
    return Transfers(layer_X, expert_X, source_X, destination_X, slot_X,
                     source_X // per_node != destination_X // per_node)


def rebalanced(load_LE: np.ndarray, old: Placement, tolerance: float = 0.02) -> Placement:
    """A placement for new loads, near the old one.

    In each layer it is one of three: the old placement; that after a search from there, by group with every group on
    its node; and a new one, arranged. It takes that with fewest replicas to send among those whose fullest device comes
    within `tolerance` of the best.

    Args:
      load_LE: as `place` takes it.
      tolerance: a share of the mean load of devices. At zero, nothing but the fullest device counts.

    Raises:
      ConfigError: the loads are not those of this placement, or the tolerance is negative.
    """
    deployment = old.deployment
    load_LE = checked_loads(load_LE, deployment)
    if len(load_LE) != len(old.expert_LS):
        raise ConfigError(f"loads have {len(load_LE)} layers, the placement {len(old.expert_LS)}: give the same layers")
    if tolerance < 0:
        raise ConfigError(f"tolerance ({tolerance:g}) must be at least 0: 0.02 is 2% of the mean load of devices")
    allowed_L = tolerance * load_LE.sum(axis=1) / deployment.devices
    near = np.stack([_searched_from(load_E, expert_MP, deployment, enough) for load_E, expert_MP, enough in
                     zip(load_LE, old.expert_LMP, lower_bound(load_LE, deployment) + allowed_L, strict=True)])
    choices = [old, *(arranged(new, old) for new in (
        old._replace(expert_LS=near.reshape(old.expert_LS.shape).astype(np.int32)), place(load_LE, deployment)))]
    fullest_CL = np.stack([choice.device_load(load_LE).max(axis=1) for choice in choices])
    moves_CL = np.stack([np.bincount(transfers(choice, old).layer_X, minlength=len(load_LE)) for choice in choices])
    good_CL = fullest_CL <= fullest_CL.min(axis=0) * (1 + search.LEAST_GAIN) + allowed_L
    # Of equally many moves, the better balance.
    rank_CL = np.lexsort((fullest_CL, np.where(good_CL, moves_CL, np.iinfo(np.int64).max)), axis=0)
    return old._replace(expert_LS=np.stack([choices[best].expert_LS[layer] for layer, best in enumerate(rank_CL[0])]))


def _searched_from(load_E: np.ndarray, expert_MP: np.ndarray, deployment: Deployment, enough: float) -> np.ndarray:
    """[M, P]: each domain's devices balanced by exchanges among themselves."""
    return np.concatenate([search.balanced(load_E, domain_MP, enough)
                           for domain_MP in np.split(expert_MP, deployment.domains)])


def _arranged_layer(new_MP: np.ndarray, old_MP: np.ndarray, deployment: Deployment) -> np.ndarray:
    """[M, P]: an optimal assignment of the new devices to the old, or of devices in nodes and then of nodes."""
    cost_MM = _cost(new_MP, old_MP, deployment)
    if deployment.is_global:
        new_of_old_M = linear_sum_assignment(cost_MM.T)[1]
    else:
        per_node = deployment.devices_per_node
        # For every new node in every old one's place.
        cost_NNMM = cost_MM.reshape(deployment.nodes, per_node, deployment.nodes, per_node).transpose(2, 0, 3, 1)
        inside_NNM = np.array([[linear_sum_assignment(pair_MM)[1] for pair_MM in pairs_NMM] for pairs_NMM in cost_NNMM])
        cost_NN = np.take_along_axis(cost_NNMM, inside_NNM[..., None], axis=-1).sum(axis=(2, 3))
        old_N, new_N = linear_sum_assignment(cost_NN)
        new_of_old_M = (new_N[:, None] * per_node + inside_NNM[old_N, new_N]).ravel()
    return np.stack([_kept_in_place(new_P, old_P) for new_P, old_P in zip(new_MP[new_of_old_M], old_MP, strict=True)])


def _cost(new_MP: np.ndarray, old_MP: np.ndarray, deployment: Deployment) -> np.ndarray:
    """[new M, old M]: replicas that a new device would have to be sent in an old one's place, and, weighed so that all
    together count less than one, those that no other device of that node has."""
    has_new_ME, has_old_ME = (search.has(expert_MP, deployment.experts) for expert_MP in (new_MP, old_MP))
    on_node_NE = has_old_ME.reshape(deployment.nodes, -1, deployment.experts).any(axis=1)
    wanted_ME = has_new_ME.astype(float)
    absent_MM = new_MP.shape[1] - wanted_ME @ has_old_ME.T
    far_MN = new_MP.shape[1] - wanted_ME @ on_node_NE.T
    return absent_MM + np.repeat(far_MN, deployment.devices_per_node, axis=1) / (deployment.slots + 1)


def _kept_in_place(new_P: np.ndarray, old_P: np.ndarray) -> np.ndarray:
    """The new experts of a device, those that it has in the slots that they are in."""
    placed_P = old_P.copy()
    placed_P[~np.isin(old_P, new_P)] = new_P[~np.isin(new_P, old_P)]
    return placed_P


def _check_alike(new: Placement, old: Placement) -> None:
    if new.deployment != old.deployment or new.expert_LS.shape != old.expert_LS.shape:
        raise ConfigError(f"the new placement is of {len(new.expert_LS)} layers on {new.deployment}, the old of "
                          f"{len(old.expert_LS)} on {old.deployment}: place experts anew to change the deployment")
