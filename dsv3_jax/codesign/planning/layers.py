"""How long a layer takes on one device: its operations at measured rates, and its exchange with experts elsewhere."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.links import Link
from dsv3_jax.codesign.planning.operations import Layer, Operation, Phase, Work, layer_operations
from dsv3_jax.codesign.planning.rates import KernelRates
from dsv3_jax.expert_parallel.exchange import RowBytes

Resource = str
"""What an operation waits for: "tensor cores", "HBM", the name of a network, ..."""


class Timed(NamedTuple):
    """An operation and its seconds."""

    operation: Operation
    seconds: float
    resource: Resource
    why: str


@dataclass(frozen=True)
class Machine:
    """Hardware, and the rates that its kernels reach."""

    hardware: Hardware
    rates: KernelRates
    domain: int
    """Devices that the fast network joins."""

    def hops(self, devices: int) -> float:
        """Mean links that an all-to-all crosses between neighbours on the fast network: on a torus of equal sides that
        wraps around, a quarter of each side; one through switches."""
        torus = self.hardware.torus
        return max(1.0, torus * devices ** (1 / torus) / 4) if torus else 1.0

    def time(self, operation: Operation) -> Timed:
        """The larger of FLOPs at the kernel's rate and bytes at HBM's."""
        memory = self.rates.bytes_per_second(self.hardware)
        if operation.kind == "memory":
            return Timed(operation, operation.bytes / memory.value, "HBM",
                         f"{_giga(operation.bytes)}B at {_giga(memory.value)}B/s ({memory.source})")
        flops, reached, source = operation.flops, *self._reached(operation)
        if operation.bytes / memory.value > flops / reached:
            return Timed(operation, operation.bytes / memory.value, "HBM",
                         f"{_giga(operation.bytes)}B of weights at {_giga(memory.value)}B/s ({memory.source})")
        return Timed(operation, flops / reached, "tensor cores",
                     f"{flops / 1e12:.4g} TFLOP at {reached / 1e12:.4g} TFLOP/s ({source})")

    def _reached(self, operation: Operation) -> tuple[float, str]:
        """FLOP/s that the model asks for, so less than a kernel's own where it computes more."""
        if operation.kind == "weight":
            return self.rates.weight_gradient(self.hardware, operation.fp8)
        if operation.kind in ("product", "experts"):
            return self.rates.product(self.hardware, operation.fp8, operation.n, operation.k,
                                      operation.kind == "experts")
        kernel = self.rates.core(self.hardware, operation.kind == "core_backward")
        return kernel.flops / kernel.computed(operation.n, operation.k), kernel.source


def _giga(value: float) -> str:
    return f"{value / 1e9:.4g} G"


class Exchange(NamedTuple):
    """Seconds of one layer's dispatch and combine for one micro-batch, and by whom they wait."""

    forward: float
    backward: float
    bytes_out: float
    """Between nodes, both passes."""
    bytes_up: float
    """Inside nodes."""
    resource: Resource


class LayerTime(NamedTuple):
    """One layer, one micro-batch, one device."""

    operations: tuple[Timed, ...]
    exchange: Exchange | None

    def computing(self, phase: Phase) -> float:
        """Seconds of a phase without exchanges."""
        return sum(timed.seconds for timed in self.operations if timed.operation.phase == phase)


@functools.lru_cache(maxsize=4096)
def layer_time(work: Work, layer: Layer, machine: Machine, wire: RowBytes | None) -> LayerTime:
    """Of one layer.

    Args:
      wire: bytes of a row in each exchange; None where experts are all at home.
    """
    operations = tuple(machine.time(operation) for operation in layer_operations(work, layer))
    has_experts = layer in ("experts", "prediction")
    return LayerTime(operations, exchange(work, machine, wire) if wire and has_experts else None)


def exchange(work: Work, machine: Machine, wire: RowBytes) -> Exchange:
    """A token's row crosses the slow network once for each other node, and the fast one once for each device beside the
    one where it enters (paper 2, section 3.2.2). Both networks carry at once what is in flight, at the bandwidths that
    they reach (`links`), so the slower of the two tells."""
    again = wire.dispatch if work.recompute in ("experts", "full") else 0
    passes = (wire.dispatch + wire.combine, wire.dispatch_gradients + wire.combine_gradients + again)
    out, up = (work.tokens * work.imbalance * rows for rows in (work.rows.slow_rows, work.rows.fast_rows))
    slow, fast = machine.hardware.scale_out, machine.hardware.scale_up
    hops = machine.hops(work.fast_devices)
    forward, backward = (max(_seconds(slow, out, size), _seconds(fast, up * hops, size)) for size in passes)
    bound = slow if _seconds(slow, out, passes[0]) >= _seconds(fast, up * hops, passes[0]) else fast
    return Exchange(forward, backward, out * sum(passes), up * sum(passes), bound.name)


def _seconds(link: Link, rows: float, row_bytes: float) -> float:
    """Of two exchanges; latency once each way."""
    return rows * row_bytes / link.effective + (2 * (link.latency or 0.0) if rows else 0.0)
