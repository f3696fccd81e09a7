"""Few, equally loaded bins: how many replicas an expert has, and which device each lies on. For one layer.

The greedy way is that of DeepSeek's EPLB, the balancer they published beside DeepSeek-V3: one replica more, again and
again, for the expert whose replicas carry most; then the heaviest replica first, into the least loaded device with
room. It never takes anything back, so a search follows that does, and that starts where the greedy way ended, so that
what comes out is never worse.

    E  experts              N  bins: devices, or nodes          K  kinds of items: experts, or groups, or devices
    P  items of one bin     C  candidates for the next step

No bin has two items of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

RECOUNTS, TRIES, SWAPS = 64, 64, 16
"""At most so many changes of counts, each found among so many tries, each followed by so many swaps. DeepSeek-V3's
deployments take a few changes."""
LEAST_GAIN = 1e-9
"""Of the fullest bin: less is rounding, on which a search could go in circles."""


def replica_counts(load_E: np.ndarray, slots: int, most: int, favour: float = 0.0) -> np.ndarray:
    """int [E], summing to `slots`, each from 1 to `most`: one more, again and again, for the expert with the largest
    load / (count + favour).

    Without favour the heaviest replica is as light as any counts can make it: an expert that got its c-th replica so
    must have it in any solution that is as good. With it, experts with much load get more of them.
    """
    counts_E = np.ones(len(load_E), np.int64)
    for _ in range(slots - len(load_E)):
        counts_E[np.argmax(np.where(counts_E < most, load_E / (counts_E + favour), -1))] += 1
    return counts_E


def packed(load_K: np.ndarray, kind_I: np.ndarray, bins: int) -> np.ndarray:
    """[N, P]: kinds in each bin; the heaviest item first, into the least loaded bin with room and none of its kind.

    Args:
      load_K: of an item of each kind.
      kind_I: of the items, which fill all bins; none more often than there are bins.
    """
    room = len(kind_I) // bins
    kind_NP, filled_N, total_N = np.full((bins, room), -1), np.zeros(bins, int), np.zeros(bins)
    has_NK = np.zeros((bins, len(load_K)), bool)

    def put(kind: int, into: int, place: int) -> None:
        kind_NP[into, place], has_NK[into, kind] = kind, True
        total_N[into] += load_K[kind]
    for kind in kind_I[np.argsort(-load_K[kind_I], kind="stable")]:
        allowed_N = (filled_N < room) & ~has_NK[:, kind]
        into = int(np.argmin(np.where(allowed_N, total_N, np.inf)))
        if not allowed_N.any():
            # All bins with room have this kind. A bin without it is full, so it has a kind that one with room lacks.
            full = int(np.argmin(np.where(has_NK[:, kind], np.inf, total_N)))
            into = int(np.argmax(filled_N < room))
            place = int(np.flatnonzero(~has_NK[into, kind_NP[full]])[-1])
            displaced = kind_NP[full, place]
            has_NK[full, displaced] = False
            total_N[full] -= load_K[displaced]
            put(kind, full, place)
            kind = displaced
        put(kind, into, int(filled_N[into]))
        filled_N[into] += 1
    return kind_NP


def bin_loads(load_K: np.ndarray, kind_NP: np.ndarray) -> np.ndarray:
    """[N]: sums of their items' loads."""
    return load_K[kind_NP].sum(axis=1)


def balanced_by_swaps(load_K: np.ndarray, kind_NP: np.ndarray, steps: int | None = None,
                      enough: float = 0.0) -> np.ndarray:
    """The bins after exchanges of single items, until none makes the fullest bin less full.

    Args:
      steps: exchanges at most; one for each item unless said.
      enough: ends as soon as no bin has more load.
    """
    for _ in range(kind_NP.size if steps is None else steps):
        if bin_loads(load_K, kind_NP).max() <= enough:
            break
        better_NP = _swapped(load_K, kind_NP)
        if better_NP is None:
            break
        kind_NP = better_NP
    return kind_NP


def balanced(load_E: np.ndarray, expert_NP: np.ndarray, enough: float) -> np.ndarray:
    """The devices after swaps of replicas, and after changes of counts: one expert's slot for one more of another.

    A change of counts rarely is a gain before replicas are swapped again, so that is tried too.

    Args:
      load_E: of experts; those on none of these devices stay so.
      expert_NP: what each device holds.
      enough: as above.
    """
    expert_NP = balanced_by_swaps(replica_loads(load_E, expert_NP), expert_NP, enough=enough)
    for _ in range(RECOUNTS):
        fullest = fullest_device(load_E, expert_NP)
        if fullest <= enough:
            break
        for changed_NP in _recounted(load_E, expert_NP):
            changed_NP = balanced_by_swaps(replica_loads(load_E, changed_NP), changed_NP, SWAPS, enough)
            if fullest_device(load_E, changed_NP) < fullest * (1 - LEAST_GAIN):
                expert_NP = changed_NP
                break
        else:
            break
    return expert_NP


def replica_loads(load_E: np.ndarray, expert_NP: np.ndarray) -> np.ndarray:
    """[E]: of one replica of each expert; an expert's load is shared evenly."""
    return load_E / np.maximum(np.bincount(expert_NP.ravel(), minlength=len(load_E)), 1)


def fullest_device(load_E: np.ndarray, expert_NP: np.ndarray) -> float:
    """The load of the device with most."""
    return float(bin_loads(replica_loads(load_E, expert_NP), expert_NP).max())


def _swapped(load_K: np.ndarray, kind_NP: np.ndarray) -> np.ndarray | None:
    """After the best exchange of an item of the fullest bin for one of another: that which leaves the fuller of the two
    least full. None if that is no gain."""
    item_NP, has_NK = load_K[kind_NP], has(kind_NP, len(load_K))
    total_N = item_NP.sum(axis=1)
    fullest = int(np.argmax(total_N))
    less_PNP = item_NP[fullest, :, None, None] - item_NP
    fuller_PNP = np.maximum(total_N[fullest] - less_PNP, total_N[:, None] + less_PNP)
    twice_PNP = has_NK[:, kind_NP[fullest]].T[:, :, None] | has_NK[fullest][kind_NP]
    fuller_PNP[twice_PNP] = np.inf
    mine, other, theirs = np.unravel_index(np.argmin(fuller_PNP), fuller_PNP.shape)
    if fuller_PNP[mine, other, theirs] >= total_N[fullest] * (1 - LEAST_GAIN):
        return None
    kind_NP = kind_NP.copy()
    kind_NP[fullest, mine], kind_NP[other, theirs] = kind_NP[other, theirs], kind_NP[fullest, mine]
    return kind_NP


def _recounted(load_E: np.ndarray, expert_NP: np.ndarray) -> Iterator[np.ndarray]:
    """After changes of one slot to another expert, those first that leave the fullest of all devices concerned least
    full.

    Changed are slots anywhere to experts of the fullest device, and its own to any expert; never an expert's only slot.
    """
    count_E, has_NE = np.bincount(expert_NP.ravel(), minlength=len(load_E)), has(expert_NP, len(load_E))
    total_N = bin_loads(load_E / np.maximum(count_E, 1), expert_NP)
    fullest = int(np.argmax(total_N))
    tried_NPE = (count_E[expert_NP] > 1)[:, :, None] & (~has_NE & (count_E > 0))[:, None]
    tried_NPE &= has_NE[fullest] | (np.arange(len(expert_NP)) == fullest)[:, None, None]
    device_C, place_C, gains_C = np.nonzero(tried_NPE)
    if not len(device_C):
        return
    loses_C = expert_NP[device_C, place_C]
    after_gain_C = load_E[gains_C] / (count_E[gains_C] + 1)
    after_loss_C = load_E[loses_C] / (count_E[loses_C] - 1)
    gainers_CN, losers_CN = has_NE.T[gains_C], has_NE.T[loses_C]
    total_CN = (total_N + gainers_CN * (after_gain_C - load_E[gains_C] / count_E[gains_C])[:, None]
                + losers_CN * (after_loss_C - load_E[loses_C] / count_E[loses_C])[:, None])
    # The changed device is among the losers, and has lost the replica altogether.
    total_CN[np.arange(len(device_C)), device_C] += after_gain_C - after_loss_C
    fullest_C = np.max(np.where(gainers_CN | losers_CN, total_CN, -np.inf), axis=1)
    for best in np.argsort(fullest_C, kind="stable")[:TRIES]:
        changed_NP = expert_NP.copy()
        changed_NP[device_C[best], place_C[best]] = gains_C[best]
        yield changed_NP


def has(kind_NP: np.ndarray, kinds: int) -> np.ndarray:
    """bool [N, K]: whether a bin has an item of a kind."""
    has_NK = np.zeros((len(kind_NP), kinds), bool)
    np.put_along_axis(has_NK, kind_NP, True, axis=1)
    return has_NK


def fullest_bin_at_least(load_I: np.ndarray, bins: int) -> float:
    """A bound on the fullest of bins with equally many items, whoever packs them.

    With i items in descending order alone in i of N bins, the others have room for P (N - i) more. So of the first
    i + P (N - i) + 1, one of the first i shares its bin with another, and P - 2 more come on top. That is exact for
    P = 1 and P = 2.
    """
    descending_I = -np.sort(-load_I)
    room = len(load_I) // bins
    if room == 1:
        return float(descending_I[0])
    alone = np.arange(1, bins + 1)
    pairs = descending_I[alone - 1] + descending_I[alone + room * (bins - alone)]
    rest = math.fsum(descending_I[len(load_I) - (room - 2):])
    return float(pairs.max()) + rest
