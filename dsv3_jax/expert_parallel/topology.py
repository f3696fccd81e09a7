"""How experts are spread over the two networks."""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.mesh import FAST_AXES


class Topology(NamedTuple):
    """Expert e lives on node e // experts_per_node, there on device e % experts_per_node // experts_per_device."""

    experts: int
    scale_out: int = 1
    scale_up: int = 1
    """Devices of one node: of the mesh axes scale_up and context together."""

    @property
    def devices(self) -> int:
        return self.scale_out * self.scale_up

    @property
    def experts_per_node(self) -> int:
        return self.experts // self.scale_out

    @property
    def experts_per_device(self) -> int:
        return self.experts_per_node // self.scale_up

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that experts are really spread over."""
        return ("scale_out",) * (self.scale_out > 1) + FAST_AXES * (self.scale_up > 1)
