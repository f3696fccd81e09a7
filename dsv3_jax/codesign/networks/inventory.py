"""What a topology is made of, by formula: for sizes that no graph is built for, and to check graphs that are.

Links are cables between switches, as paper 1's table 3 counts them.
"""

from __future__ import annotations

import dataclasses

from dsv3_jax.codesign.checks import at_least, even_ports
from dsv3_jax.codesign.networks.dragonfly import used_global_ports
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.codesign.networks.slim_fly import network_ports


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What is bought."""

    endpoints: int
    switches: int
    links: int


def counted(network: Network) -> Inventory:
    """Of a graph."""
    return Inventory(network.endpoints, network.switches, network.links)


def two_layer(ports: int) -> Inventory:
    """k^2/2 endpoints, k leaves and k/2 spines for k ports."""
    even_ports(ports)
    return Inventory(ports ** 2 // 2, 3 * ports // 2, ports ** 2 // 2)


def multi_plane(ports: int, planes: int = 8) -> Inventory:
    """A full two-layer fat tree a plane."""
    at_least(1, planes=planes)
    plane = two_layer(ports)
    return Inventory(planes * plane.endpoints, planes * plane.switches, planes * plane.links)


def three_layer(ports: int) -> Inventory:
    """k^3/4 endpoints, 5 k^2/4 switches, two layers of k^3/4 links."""
    even_ports(ports)
    return Inventory(ports ** 3 // 4, 5 * ports ** 2 // 4, ports ** 3 // 2)


def slim_fly(q: int, endpoints_per_switch: int | None = None) -> Inventory:
    """2q^2 switches of (3q - delta)/2 network ports; also for q such as 28 that no graph exists for."""
    to_switches = network_ports(q)
    held = -(-to_switches // 2) if endpoints_per_switch is None else endpoints_per_switch
    at_least(1, endpoints_per_switch=held)
    return Inventory(2 * q * q * held, 2 * q * q, q * q * to_switches)


def dragonfly(endpoints: int, routers: int, global_ports: int, groups: int) -> Inventory:
    """Groups of `routers`, each with `endpoints`, all joined inside a group; global ports used evenly."""
    at_least(1, endpoints=endpoints)
    used = used_global_ports(routers, global_ports, groups)
    return Inventory(endpoints * routers * groups, routers * groups,
                     groups * routers * (routers - 1) // 2 + groups * used // 2)


TABLE_3 = {
    "FT2": two_layer(64), "MPFT": multi_plane(64, 8), "FT3": three_layer(64), "SF": slim_fly(28),
    "DF": dragonfly(16, 32, 16, 511),
}
"""Paper 1, table 3, with switches of 64 ports. The paper prints the counts; the sizes that give them (q = 28; 511
groups of 32 routers of 16 endpoints and 16 global ports) are inferred. For q = 28, no power of a prime, there is no
MMS graph."""
