"""The end of a training step: gradients summed over who shares a weight, AdamW on each one's part, weights sent back.

ZeRO-1 (paper 2, section 3.2): a device keeps master weights and moments of its part only, sums arrive by reduce-scatter
and weights leave by all-gather. Sums over many nodes go through the fast network first, so that the slow one carries a
node's share once; pieces follow each other through both. Nothing of it is hidden by computing.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.codesign.planning.layers import Machine

GRADIENT_BYTES, WEIGHT_BYTES = 4, 2
OPTIMIZER_BYTES = 4 + 2 * 4 + 2 * 2 * 2 + 2
"""Of a weight in AdamW: gradient; master weight, read and written; two bf16 moments likewise; the weight in bf16."""


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


def update(machine: Machine, experts: float, others: float, copies: int, expert_parallel: int,
           moved: float) -> Update:
    """Of one device.

    Args:
      experts: weights of routed experts on the device; `copies` devices have the same.
      others: all other weights on the device, which copies * expert_parallel devices have.
      moved: bytes that are sent for a weight: `GRADIENT_BYTES` for a sum in float32, `WEIGHT_BYTES` for a gathering or
        a sum in bf16.
    """
    hardware = machine.hardware
    together = min(copies, max(1, machine.domain // expert_parallel))  # copies of an expert inside one fast domain
    slow, fast = _hierarchical(experts, copies, together)
    others_slow, others_fast = _hierarchical(others, copies * expert_parallel,
                                             min(copies * expert_parallel, machine.domain))
    slow, fast = (slow + others_slow) * moved, (fast + others_fast) * moved
    own = experts / copies + others / (copies * expert_parallel)
    return Update(slow / hardware.scale_out.effective, fast / hardware.scale_up.effective,
                  own * OPTIMIZER_BYTES / machine.rates.bytes_per_second(hardware).value, slow, fast)


def _hierarchical(weights: float, members: int, inside: int) -> tuple[float, float]:
    """Weights that one of `members` sends over (the slow network, the fast one) in a reduce-scatter or all-gather, of
    which `inside` share a fast domain."""
    domains = max(1, members // inside)
    return weights / inside * (domains - 1) / domains, weights * (inside - 1) / inside
