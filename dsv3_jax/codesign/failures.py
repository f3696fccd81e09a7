"""Training on devices that fail (paper 1, section 6.1): the share of time that is progress.

- a failure of any device stops all; devices fail independently at a constant rate, so the system fails `devices` times
  as often as one (the paper's "proportional to system size");
- a failure costs what was computed since the last checkpoint, the time until it is noticed (`detection`) and the time
  until the job runs again (`restart`), in both of which it can fail again;
- a checkpoint stops training for `checkpoint` seconds, at intervals of one's choice; the best is Young's, made exact by
  Daly (J. W. Young, CACM 17(9), 1974; J. T. Daly, Future Generation Computer Systems 22, 2006);
- a link that drops for a moment is a failure too, unless the link layer sends again (section 6.3): then `retried` of
  all failures are none.

Not here: corruption that nobody notices, and whose checkpoints are bad; spare devices; failures that come together.

The rate is not in the paper. It is that of Llama 3 (arXiv 2407.21783, section 3.3.4 and table 5): 419 unexpected
interruptions in 54 days on 16,384 H100, of which 35 by a switch or a cable.

Units: seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3_jax.codesign.checks import not_negative, positive, share

LLAMA_3_DEVICE_SECONDS = 16_384 * 54 * 86_400 / 419
LLAMA_3_LINK_SHARE = 35 / 419


@dataclass(frozen=True)
class Reliability:
    """How often one device fails, and what that costs."""

    device_seconds: float = LLAMA_3_DEVICE_SECONDS
    """Mean time of one device between failures."""
    checkpoint: float = 30.0
    """Training stands still for it. An assumption: see `checkpoint_floor`."""
    detection: float = 600.0
    """PyTorch's time limit of an NCCL collective, by default: a hang is noticed by nothing else."""
    restart: float = 300.0
    """From noticing until training goes on from the checkpoint. An assumption."""
    retried: float = 0.0
    """Share of failures that a retry at the link hides."""

    def __post_init__(self) -> None:
        positive(device_seconds=self.device_seconds, checkpoint=self.checkpoint)
        not_negative(detection=self.detection, restart=self.restart)
        share(retried=self.retried)

    def between(self, devices: int) -> float:
        """Mean time between failures of a system; infinite if all are hidden."""
        positive(devices=devices)
        return self.device_seconds / devices / (1 - self.retried) if self.retried < 1 else math.inf


def checkpoint_floor(state_bytes: float, devices: int, node: int = 8, storage: float = 50e9) -> float:
    """Seconds in which all nodes' storage NICs, one of 400 Gbit/s each (paper 1, section 5.1), carry away the state.
    What the storage itself takes is not published with it."""
    positive(state_bytes=state_bytes, devices=devices, node=node, storage=storage)
    return state_bytes / (devices / node * storage)


def goodput(devices: int, interval: float, reliability: Reliability) -> float:
    """Share of time that is progress, with a checkpoint after each `interval` of it.

    Daly's expected time of an interval and its checkpoint: M exp(R/M) (exp((interval + checkpoint)/M) - 1).
    """
    positive(interval=interval)
    between = reliability.between(devices)
    cycle = interval + reliability.checkpoint
    if math.isinf(between):
        return interval / cycle
    if cycle / between > 700:  # exp would overflow: no interval is ever finished
        return 0.0
    lost = math.exp(-(reliability.detection + reliability.restart) / between)
    return interval / between * lost / math.expm1(cycle / between)


def youngs_interval(devices: int, reliability: Reliability) -> float:
    """The best interval where checkpoints are short: sqrt(2 checkpoint M)."""
    return math.sqrt(2 * reliability.checkpoint * reliability.between(devices))


def best_interval(devices: int, reliability: Reliability) -> float:
    """Where `goodput` is highest: (1 - t/M) exp((t + checkpoint)/M) = 1, by bisection; it does not depend on how long
    detection and restart take. Infinite where nothing fails."""
    between = reliability.between(devices)
    if math.isinf(between):
        return math.inf
    low, high = 0.0, 1.0  # in units of M; the left side falls from exp(checkpoint/M) to 0
    for _ in range(50):
        middle = (low + high) / 2
        if math.log1p(-middle) + middle + reliability.checkpoint / between > 0:
            low = middle
        else:
            high = middle
    return low * between


def best_goodput(devices: int, reliability: Reliability) -> float:
    """At the best interval."""
    interval = best_interval(devices, reliability)
    return 1.0 if math.isinf(interval) else goodput(devices, interval, reliability)
