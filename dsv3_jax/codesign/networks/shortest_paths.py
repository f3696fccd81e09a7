"""Shortest ways between switches of a network: how long, how many, and over which cables.

A way is a sequence of cables; of several cables between two switches each makes another way. Every function takes many
pairs of switches at once, [P] of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from dsv3_jax.codesign.checks import at_most
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.config import ConfigError

UNREACHED = -1
_CHUNK = 1 << 22
"""Elements of a table looked at in one go."""


class Share(NamedTuple):
    """A part of the traffic of one pair on one cable."""

    pair_N: np.ndarray
    cable_N: np.ndarray
    """Directed: plus the number of cables for the way back."""
    share_N: np.ndarray


class ShortestPaths:
    """Of a network, to the switches that have endpoints."""

    def __init__(self, network: Network):
        """
        Raises:
          ConfigError: more switches than there is memory for a table of.
        """
        self.network = network
        switches = len(network.level_S)
        at_most("switches", switches, 8192, "a larger network can be counted, and its distances sampled, but its "
                "flows are not simulated")
        cables = network.links
        tail = np.concatenate([network.cables_C2[:, 0], network.cables_C2[:, 1]])
        head = np.concatenate([network.cables_C2[:, 1], network.cables_C2[:, 0]])
        order = np.lexsort((np.arange(2 * cables), head, tail))  # parallel cables side by side
        degree_S = np.bincount(tail, minlength=switches)
        slot = np.arange(2 * cables) - np.repeat(np.cumsum(degree_S) - degree_S, degree_S)
        width = max(1, int(degree_S.max(initial=0)))
        self.next_SD = np.full((switches, width), UNREACHED)
        self.cable_SD = np.full((switches, width), UNREACHED)
        self.next_SD[tail[order], slot], self.cable_SD[tail[order], slot] = head[order], order
        self.column_S = np.full(switches, UNREACHED)
        targets = np.unique(network.switch_E[network.switch_E >= 0])
        self.column_S[targets] = np.arange(len(targets))
        self._measure(sparse.csr_matrix((np.ones(2 * cables), (tail, head)), shape=(switches, switches)), targets)

    def _measure(self, joined: sparse.csr_matrix, targets: np.ndarray) -> None:
        """hops_ST: cables of a shortest way, -1 without one; ways_ST: how many. T are the switches with endpoints."""
        shape = (joined.shape[0], len(targets))
        self.hops_ST = np.full(shape, UNREACHED, np.int16)
        self.ways_ST = np.zeros(shape)
        edge = np.zeros(shape)
        edge[targets, np.arange(len(targets))] = 1
        hops = 0
        while edge.any():
            new = edge > 0
            self.hops_ST[new], self.ways_ST[new] = hops, edge[new]
            edge = np.where(self.hops_ST == UNREACHED, joined @ edge, 0.0)
            hops += 1

    def reach(self, start_P: np.ndarray, end_P: np.ndarray) -> np.ndarray:
        """bool [P]: whether there is a way; never to or from -1, the switch of what is cut off."""
        there_P = (start_P >= 0) & (end_P >= 0)
        return there_P & (self.hops_ST[start_P, self.column_S[end_P]] != UNREACHED)

    def one_way(self, start_P: np.ndarray, end_P: np.ndarray, choice_P: np.ndarray, table: bool) -> Share:
        """One way each, chosen at every switch among the cables that lead nearer.

        Args:
          choice_P: uint64; what the choice follows from: with `table`, the target's number as the mixed radix of a
            routing table (D-mod-k), so that neighbours part as early as they can; else a hash.
        """
        at_P, found = start_P.copy(), []
        quotient_P = choice_P.copy()
        pairs = np.arange(len(start_P))
        while len(moving := pairs[at_P != end_P]):
            for part in np.array_split(moving, -(-len(moving) * self.next_SD.shape[1] // _CHUNK)):
                nearer_PD = self._nearer(at_P[part], end_P[part])
                slot = (self._by_table(at_P[part], nearer_PD, quotient_P, part) if table
                        else _nth(nearer_PD, _mixed(quotient_P[part], at_P[part]) % _counts(nearer_PD)))
                found.append((part, self.cable_SD[at_P[part], slot]))
                at_P[part] = self.next_SD[at_P[part], slot]
        if not found:
            return Share(pairs[:0], pairs[:0], np.zeros(0))
        pair_N, cable_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Share(pair_N, cable_N, np.ones(len(pair_N)))

    def _nearer(self, at_P: np.ndarray, end_P: np.ndarray) -> np.ndarray:
        """bool [P, slots]: cables of a switch that lie on a shortest way."""
        column_P = self.column_S[end_P]
        next_PD = self.next_SD[at_P]
        return (next_PD != UNREACHED) & (self.hops_ST[next_PD, column_P[:, None]]
                                         == self.hops_ST[at_P, column_P][:, None] - 1)

    def _by_table(self, at_P: np.ndarray, nearer_PD: np.ndarray, quotient_P: np.ndarray,
                  part: np.ndarray) -> np.ndarray:
        """Slots; uses up `quotient_P[part]`, by the number of switches to choose from."""
        next_PD = np.where(nearer_PD, self.next_SD[at_P], UNREACHED)
        first_PD = nearer_PD & (next_PD != np.pad(next_PD, ((0, 0), (1, 0)), constant_values=-2)[:, :-1])
        switches_P = _counts(first_PD)
        chosen = _nth(first_PD, quotient_P[part] % switches_P)
        quotient_P[part] //= switches_P
        same_PD = nearer_PD & (next_PD == next_PD[np.arange(len(chosen)), chosen][:, None])
        return _nth(same_PD, quotient_P[part] % _counts(same_PD))

    def all_ways(self, start_P: np.ndarray, end_P: np.ndarray) -> Share:
        """Every shortest way, each with an equal part of the traffic."""
        at_N, pair_N, share_N = start_P.copy(), np.arange(len(start_P)), np.ones(len(start_P))
        found = []
        while len(at_N := at_N[moving := at_N != end_P[pair_N]]):
            pair_N, share_N = pair_N[moving], share_N[moving]
            row, slot = np.nonzero(self._nearer(at_N, end_P[pair_N]))
            here, there, pair = at_N[row], self.next_SD[at_N[row], slot], pair_N[row]
            column = self.column_S[end_P[pair]]
            share = share_N[row] * self.ways_ST[there, column] / self.ways_ST[here, column]
            found.append((pair, self.cable_SD[here, slot], share))
            # Ways that meet again go on as one.
            together, back = np.unique(pair * len(self.column_S) + there, return_inverse=True)
            pair_N, at_N = np.divmod(together, len(self.column_S))
            share_N = np.bincount(back, weights=share)
        if not found:
            return Share(pair_N[:0], pair_N[:0], np.zeros(0))
        return Share(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def list_ways(self, start: int, end: int, most: int) -> np.ndarray:
        """int [ways, hops]: the directed cables of every shortest way of one pair.

        Raises:
          ConfigError: there is none, or more than `most`.
        """
        if not self.reach(np.array([start]), np.array([end]))[0]:
            raise ConfigError(f"{self.network.name}: no way from switch {start} to switch {end}")
        at_most("ways", int(self.ways_ST[start, self.column_S[end]]), most, f"from switch {start} to switch {end}")
        at_W, ways_WH = np.array([start]), np.zeros((1, 0), int)
        while at_W[0] != end:
            row, slot = np.nonzero(self._nearer(at_W, np.full(len(at_W), end)))
            ways_WH = np.concatenate([ways_WH[row], self.cable_SD[at_W[row], slot][:, None]], axis=1)
            at_W = self.next_SD[at_W[row], slot]
        return ways_WH


def _counts(marked_PD: np.ndarray) -> np.ndarray:
    """uint64 [P], as hashes are: numpy takes the remainder of other types in float64."""
    return marked_PD.sum(axis=1).astype(np.uint64)


def _nth(marked_PD: np.ndarray, n_P: np.ndarray) -> np.ndarray:
    """Place of the n-th mark of every row, counted from 0."""
    return np.argmax(np.cumsum(marked_PD, axis=1) == n_P[:, None].astype(np.int64) + 1, axis=1)


def _mixed(*parts: np.ndarray) -> np.ndarray:
    """uint64: a hash of numbers (the finisher of SplitMix64 after each)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def hashed(seed: int, *parts: np.ndarray) -> np.ndarray:
    """uint64: `parts`, hashed with `seed`."""
    return _mixed(np.array([seed]), *parts)
