"""Multiprocessors that communicate instead of computing, and what a co-processor for communication would give back.

Paper 1, section 4.4.1: in training up to 20 of an H800's 132 SMs forward, copy, cast and add what all-to-alls carry; in
inference everything goes by the NIC's RDMA instead, which takes no SMs but forwards nothing over NVLink. The model:

- work that computes takes time in proportion to 1 / SMs left. That is so where tensor cores are the limit; where memory
  is, or power, the SMs are missed less, and what is gained here is a bound;
- communication that runs beside it needs its 20 SMs all the time, and is as fast with a co-processor as with them;
- with fewer SMs, an exchange that they forward is slower in proportion (`tuned`), with more not faster: the network is
  full. Any share of an SM can be had.

Times are in any one unit; `ratio` is the time of communication over the time of computation on all SMs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.codesign.checks import not_negative, positive, share
from dsv3_jax.config import ConfigError


@dataclass(frozen=True)
class Multiprocessors:
    """How a GPU's are divided."""

    total: int = 132
    """H800, as every Hopper on an SXM module (paper 2, section 3.5)."""
    communicating: float = 20
    """Paper 1 section 4.4.1; paper 2 section 3.2.2."""

    def __post_init__(self) -> None:
        positive(total=self.total)
        not_negative(communicating=self.communicating)
        if self.communicating >= self.total:
            raise ConfigError(f"communicating ({self.communicating}) must leave some of total ({self.total}) SMs")

    @property
    def slowdown(self) -> float:
        """Of computation by those that are missing."""
        return self.total / (self.total - self.communicating)


def overlapped(ratio: float, multiprocessors: Multiprocessors) -> float:
    """Computation and the communication beside it, in units of the computation on all SMs."""
    not_negative(ratio=ratio)
    return max(multiprocessors.slowdown, ratio)


def tuned(ratio: float, multiprocessors: Multiprocessors) -> Multiprocessors:
    """As many communicating as make both end at once: 20 * ratio / communicating = total / (total - communicating).
    No more than there were, with which the network is full."""
    not_negative(ratio=ratio)
    most, total = multiprocessors.communicating, multiprocessors.total
    return Multiprocessors(total, min(most, total * most * ratio / (total + most * ratio)))


def overlapped_tuned(ratio: float, multiprocessors: Multiprocessors) -> float:
    """`overlapped` with the best division of SMs: 1 + ratio * communicating / total, or the network's time if more."""
    return max(tuned(ratio, multiprocessors).slowdown, ratio)


class Gain(NamedTuple):
    """Time now over the time with a co-processor."""

    fixed: float
    tuned: float


def gain(ratio: float, multiprocessors: Multiprocessors) -> Gain:
    """What a co-processor buys where communication runs beside computation."""
    best = max(1.0, ratio)
    return Gain(overlapped(ratio, multiprocessors) / best, overlapped_tuned(ratio, multiprocessors) / best)


class StepParts(NamedTuple):
    """Seconds of a training step (paper 1, table 4)."""

    forward: float
    bubble: float
    input_backward: float
    weight_backward: float
    both: float
    optimizer: float


TABLE_4 = StepParts(forward=1.13, bubble=2.06, input_backward=1.99, weight_backward=0.48, both=13.95, optimizer=0.29)
"""DeepSeek-V3 on 2,048 H800 in the multi-plane network."""


def step_without_tax(parts: StepParts, multiprocessors: Multiprocessors, compute_bound: float = 1.0) -> float:
    """Seconds of the step if all SMs computed: `compute_bound` of forward, backward, both at once, and the bubble that
    consists of waiting for them, shrinks; weight gradients, which nothing is exchanged for, and the optimizer do not.
    """
    share(compute_bound=compute_bound)
    taxed = parts.forward + parts.bubble + parts.input_backward + parts.both
    return sum(parts) - taxed * compute_bound * (1 - 1 / multiprocessors.slowdown)


def without_forwarding(ratio: float, copies: float) -> float:
    """Computation on all SMs beside an exchange by RDMA alone, which sends `copies` times what crosses the slow network
    when GPUs forward; in units of the computation.

    Raises:
      ConfigError: a number makes no sense.
    """
    not_negative(ratio=ratio)
    if not copies >= 1:
        raise ConfigError(f"copies ({copies}) must be at least 1: forwarding sends nothing twice")
    return max(1.0, ratio * copies)


def ratio_of_equal_times(copies: float, multiprocessors: Multiprocessors) -> float:
    """Below it RDMA alone is as fast as forwarding on SMs, or faster; above it, slower (at `copies` of 1, never)."""
    without_forwarding(0.0, copies)
    return multiprocessors.slowdown / copies
