"""A network as a graph: switches, cables between them, and endpoints that hang on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.codesign.checks import at_least
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """An endpoint is a NIC of one port. Cables carry both ways; between two switches there may be several."""

    name: str
    ports: int
    """Of a switch."""
    switch_E: np.ndarray
    """int [endpoints]: the switch an endpoint hangs on, -1 where its cable or switch is lost."""
    cables_C2: np.ndarray
    """int [cables, 2]: the two switches a cable joins."""
    level_S: np.ndarray
    """int [switches]: 0 for those with endpoints, more above; -1 for a lost one, whose number stays."""

    def __post_init__(self) -> None:
        at_least(1, ports=self.ports)
        ends = np.concatenate([self.cables_C2.ravel(), self.switch_E[self.switch_E >= 0]])
        used_S = np.bincount(ends, minlength=len(self.level_S))
        if len(used_S) > len(self.level_S):
            raise ConfigError(f"{self.name}: a cable goes to switch {len(used_S) - 1} of {len(self.level_S)}")
        if used_S.size and used_S.max() > self.ports:
            raise ConfigError(f"{self.name}: ports ({self.ports}) are too few: switch {used_S.argmax()} has "
                              f"{used_S.max()} cables")

    @property
    def endpoints(self) -> int:
        return len(self.switch_E)

    @property
    def switches(self) -> int:
        """Those that are not lost."""
        return int(np.sum(self.level_S >= 0))

    @property
    def links(self) -> int:
        """Cables between switches, as the paper's table 3 counts them: those of endpoints are not among them."""
        return len(self.cables_C2)

    def without(self, *, switches: Sequence[int] = (), cables: Sequence[int] = (),
                endpoints: Sequence[int] = ()) -> Network:
        """This network after losing switches (with their cables), cables by index, and cables of endpoints.

        Raises:
          ConfigError: one of them is not there.
        """
        for field, lost, there in (("switches", switches, len(self.level_S)), ("cables", cables, self.links),
                                   ("endpoints", endpoints, self.endpoints)):
            bad = [index for index in lost if not 0 <= index < there]
            if bad:
                raise ConfigError(f"{field}: {self.name} has no {bad[0]}, only 0 to {there - 1}")
        level_S, switch_E = self.level_S.copy(), self.switch_E.copy()
        level_S[list(switches)] = -1
        switch_E[list(endpoints)] = -1
        switch_E[np.isin(switch_E, list(switches))] = -1
        keep_C = ~np.isin(self.cables_C2, list(switches)).any(axis=1)
        keep_C[list(cables)] = False
        return dataclasses.replace(self, switch_E=switch_E, cables_C2=self.cables_C2[keep_C], level_S=level_S)

    def graph(self) -> Any:
        """A networkx.MultiGraph: vertices ("switch", s) with their `level`, and ("endpoint", e).

        Raises:
          ImportError: networkx is not installed; names the extra.
        """
        networkx = import_networkx()
        graph = networkx.MultiGraph(name=self.name)
        graph.add_nodes_from((("switch", s), {"level": int(level)}) for s, level in enumerate(self.level_S)
                             if level >= 0)
        graph.add_nodes_from(("endpoint", e) for e in range(self.endpoints))
        graph.add_edges_from((("switch", int(a)), ("switch", int(b))) for a, b in self.cables_C2)
        graph.add_edges_from((("endpoint", e), ("switch", int(s))) for e, s in enumerate(self.switch_E) if s >= 0)
        return graph


def import_networkx() -> Any:
    """networkx.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError('graphs of networks need networkx: pip install "dsv3-jax[codesign]"') from error
    return networkx
