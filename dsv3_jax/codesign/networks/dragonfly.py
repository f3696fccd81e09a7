"""The canonical Dragonfly: groups of fully joined routers, groups joined by each router's global ports.

Kim, Dally, Scott, Abts, *Technology-Driven, Highly-Scalable Dragonfly Topology* (ISCA'08), section 3: routers of p
endpoints, a - 1 neighbours in the group and h global ports; balanced where a = 2p = 2h.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.codesign.checks import at_least, at_most
from dsv3_jax.codesign.networks.graph import Network


def used_global_ports(routers: int, global_ports: int, groups: int) -> int:
    """Of a group's routers*global_ports: the ways to the other groups are gone through until fewer than two are left.

    Raises:
      ConfigError: too few to reach every group.
    """
    for field, value in (("routers", routers), ("global_ports", global_ports), ("groups", groups)):
        at_least(1, **{field: value})
    total = routers * global_ports
    at_most("groups", groups, total + 1, f"{routers} routers of {global_ports} global ports reach {total} other groups")
    return total - total % (groups - 1) % 2 if groups > 1 else 0


def dragonfly(endpoints: int, routers: int, global_ports: int, groups: int, ports: int | None = None) -> Network:
    """Global port n of a group goes n/2 groups forward or, odd n, back, round and round while ports last.

    Args:
      endpoints: of one router.
      routers: of one group.
      global_ports: of one router.
      ports: of a router; what is needed if not given.
    """
    at_least(1, endpoints=endpoints)
    used = used_global_ports(routers, global_ports, groups)
    port = np.arange(used)
    # A round passes every other group once: +1, -1, +2, -2, ... and last, for an even number of groups, the opposite.
    place = port % max(groups - 1, 1)
    opposite = (groups % 2 == 0) & (place == groups - 2)
    forward = (place % 2 == 0) & ~opposite
    offset = place // 2 + 1
    start = np.arange(groups)[:, None]
    ways = [_cables(start, port[forward], port[forward] + 1, offset[forward], routers, global_ports, groups),
            _cables(start[:groups // 2], port[opposite], port[opposite], offset[opposite], routers, global_ports,
                    groups)]
    low, high = np.triu_indices(routers, 1)
    inside = np.stack([low, high], axis=1)[None] + routers * np.arange(groups)[:, None, None]
    needed = endpoints + routers - 1 + global_ports
    return Network(f"dragonfly, {groups} groups of {routers} routers", needed if ports is None else ports,
                   np.repeat(np.arange(groups * routers), endpoints),
                   np.concatenate([inside.reshape(-1, 2), *ways]), np.zeros(groups * routers, int))


def _cables(start: np.ndarray, port: np.ndarray, port_there: np.ndarray, offset: np.ndarray, routers: int,
            global_ports: int, groups: int) -> np.ndarray:
    """Cables [*, 2] from `port` of groups `start` to `port_there` of the groups `offset` further."""
    here = start * routers + port // global_ports
    there = (start + offset) % groups * routers + port_there // global_ports
    return np.stack([here.ravel(), there.ravel()], axis=1)
