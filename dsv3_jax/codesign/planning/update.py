"""The end of a training step: gradients summed over who shares a weight, AdamW on each one's part, weights sent back.

ZeRO-1 (paper 2, section 3.2): a device keeps master weights and moments of its part only, sums arrive by reduce-scatter
in float32 and weights leave by all-gather in bf16. Sums over many nodes go through the fast network first, so that the
slow one carries a node's share once; pieces follow each other through both. Nothing of it is hidden by computing.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.codesign.planning.layers import Machine

GRADIENT_BYTES, WEIGHT_BYTES = 4, 2
OPTIMIZER_BYTES = 4 + 2 * 4 + 2 * 2 * 2 + 2
"""Of a weight in AdamW: gradient; master weight, read and written; two bf16 moments likewise; weight to compute with."""


class Update(NamedTuple):
    """Seconds, and bytes that one device sends."""

    slow: float
    fast: float
    memory: float
    slow_bytes: float
    fast_bytes: float

    @property
    def seconds(self) -> float:
        return self.network + self.memory

    @property
    def network(self) -> float:
        return max(self.slow, self.fast)


def update(machine: Machine, experts: float, others: float, experts_shared_by: int, others_shared_by: int,
           gathers: int = 1) -> Update:
    """Of one device.

    Args:
      experts: weights of routed experts on the device, of which `experts_shared_by` devices, each on another node, have
        the same.
      others: all other weights on the device, which `others_shared_by` devices have, in whole nodes if they can.
      gathers: times that weights are sent for one sum of gradients.
    """
    hardware = machine.hardware
    moved = GRADIENT_BYTES + gathers * WEIGHT_BYTES
    inside = min(others_shared_by, hardware.largest_scale_up)
    nodes = max(1, others_shared_by // inside)
    slow = (experts * (experts_shared_by - 1) / experts_shared_by + others / inside * (nodes - 1) / nodes) * moved
    fast = others * (inside - 1) / inside * moved
    own = experts / experts_shared_by + others / others_shared_by
    return Update(slow / hardware.scale_out.effective, fast / hardware.scale_up.effective,
                  own * OPTIMIZER_BYTES / machine.rates.bytes_per_second(hardware).value, slow, fast)
