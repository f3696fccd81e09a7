"""How experts are spread over the two networks."""

from __future__ import annotations

from typing import NamedTuple


class Topology(NamedTuple):
    """Expert e lives on node e // experts_per_node, there on device e % experts_per_node // experts_per_device."""

    experts: int
    scale_out: int = 1
    scale_up: int = 1

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
        sizes = {"scale_out": self.scale_out, "scale_up": self.scale_up}
        return tuple(name for name, size in sizes.items() if size > 1)
