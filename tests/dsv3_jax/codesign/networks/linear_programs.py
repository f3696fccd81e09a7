"""Max-min fair rates by their definition, without progressive filling."""

from __future__ import annotations

import numpy as np
from scipy import optimize


def by_linear_programs(matrix_LF: np.ndarray, capacity_L: np.ndarray) -> np.ndarray:
    """The definition: raise the least rate as far as any rates can; flows that then cannot have more are done."""
    flows = matrix_LF.shape[1]
    done: dict[int, float] = {}
    while len(done) < flows:
        # Unknowns: rates and the least of those not done.
        least = [[-1.0 if f == g else 0.0 for g in range(flows)] + [1.0] for f in range(flows) if f not in done]
        limits = np.vstack([np.hstack([matrix_LF, np.zeros((len(capacity_L), 1))]), least])
        room = np.concatenate([capacity_L, np.zeros(len(least))])
        bounds = [(done[f], done[f]) if f in done else (0, None) for f in range(flows)] + [(0, None)]
        level = -optimize.linprog([0.0] * flows + [-1.0], limits, room, bounds=bounds).fun
        bounds = [(done[f] - 1e-9, done[f]) if f in done else (level * (1 - 1e-9), None) for f in range(flows)]
        for f in set(range(flows)) - set(done):
            goal = np.zeros(flows)
            goal[f] = -1
            if -optimize.linprog(goal, matrix_LF, capacity_L, bounds=bounds).fun < level * (1 + 1e-6):
                done[f] = level
    return np.array([done[f] for f in range(flows)])
