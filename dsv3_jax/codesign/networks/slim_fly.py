"""Slim Fly: the MMS graph of McKay, Miller and Siran, whose switches are two hops apart at most.

Construction: Besta and Hoefler, *Slim Fly: A Cost Effective Low-Diameter Network Topology* (SC'14), sections II.B and
II.C; sets of generators after Hafner (2004). It exists for prime powers q = 4w + delta with delta in {-1, 0, 1}.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.codesign.checks import at_least
from dsv3_jax.codesign.networks.finite_field import Field, prime_power
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.config import ConfigError


def delta(q: int) -> int:
    """The -1, 0 or 1 with q = 4w + delta.

    Raises:
      ConfigError: there is none.
    """
    at_least(3, q=q)
    if q % 4 == 2:
        raise ConfigError(f"q ({q}) must be 4w-1, 4w or 4w+1 for a whole w")
    return {0: 0, 1: 1, 3: -1}[q % 4]


def network_ports(q: int) -> int:
    """Ports of a switch to other switches: (3q - delta)/2."""
    return (3 * q - delta(q)) // 2


def valid_q(least: int, most: int) -> list[int]:
    """Every q from `least` to `most` for which the graph exists."""
    return [q for q in range(max(least, 3), most + 1) if prime_power(q) and q % 4 != 2]


def slim_fly(q: int, endpoints_per_switch: int | None = None, ports: int | None = None) -> Network:
    """2q^2 switches in two halves of q groups; endpoints one switch after the other.

    Args:
      endpoints_per_switch: half the network's ports, rounded up, if not given: full bandwidth for random traffic.
      ports: of a switch; what is needed if not given.

    Raises:
      ConfigError: there is no such graph for q, or ports are too few.
    """
    to_switches = network_ports(q)
    held = -(-to_switches // 2) if endpoints_per_switch is None else endpoints_per_switch
    at_least(1, endpoints_per_switch=held)
    field = Field(q)
    here, there, other = (grid.ravel() for grid in np.indices((q, q, q)))
    cables = [_inside_groups(field, first, half) for half, first in enumerate(_generators(field))]
    # (0, x, y) meets (1, m, c) where y = m x + c; x, m, c are here, there, other.
    y = field.add(field.multiply(there, here), other)
    cables.append(np.stack([here * q + y, q * q + there * q + other], axis=1))
    return Network(f"Slim Fly, q={q}", to_switches + held if ports is None else ports,
                   np.repeat(np.arange(2 * q * q), held), np.concatenate(cables), np.zeros(2 * q * q, int))


def _generators(field: Field) -> tuple[np.ndarray, np.ndarray]:
    """Differences of neighbours in a group of the first and of the second half; each set is its own negative."""
    power_N, w = field.power_N, (field.q + 1) // 4
    if delta(field.q) >= 0:  # the even powers and the odd ones; without 2 in 0 they share 1, the power q-1
        return power_N[0::2], np.concatenate([power_N[1::2], power_N[:1]]) if field.p == 2 else power_N[1::2]
    low, high = np.arange(0, 2 * w - 1, 2), np.arange(2 * w - 1, 4 * w - 2, 2)
    return power_N[np.concatenate([low, high])], power_N[np.concatenate([low + 1, high + 1]) % (field.q - 1)]


def _inside_groups(field: Field, generators: np.ndarray, half: int) -> np.ndarray:
    """Cables [*, 2] of one half: two switches of a group meet if their places differ by a generator."""
    q = field.q
    place, step = (grid.ravel() for grid in np.meshgrid(np.arange(q), generators, indexing="ij"))
    pairs = np.unique(np.sort(np.stack([place, field.add(place, step)], axis=1), axis=1), axis=0)
    return (pairs[None] + q * np.arange(q)[:, None, None] + half * q * q).reshape(-1, 2)
