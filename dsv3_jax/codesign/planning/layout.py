"""How a model lies on a pod: what a plan chooses, and what `train.py` and `compile_for_pod.py` take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dsv3_jax.codesign.planning.pipelined import table_of
from dsv3_jax.config import ConfigError, MeshConfig, Precision, Recompute, RunConfig
from dsv3_jax.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes, and how a step runs on it."""

    scale_out: int
    scale_up: int
    data: int
    context: int = 1
    pipe: int = 1
    schedule: str | None = None
    """Of pipeline stages, and only with them."""
    micro_batches: int = 1
    """Of a step. In a pipeline, each replica of it works on its own part of every one."""
    precision: Precision = "fp8"
    recompute: Recompute = "paper"
    zero: str = "zero1"

    def __post_init__(self) -> None:
        if (self.pipe > 1) != (self.schedule is not None):
            raise ConfigError(f"schedule ({self.schedule}) goes with pipe ({self.pipe}) above 1: name both or none")

    @property
    def devices(self) -> int:
        return self.pipe * self.group

    @property
    def group(self) -> int:
        """Devices of one stage."""
        return self.data * self.scale_out * self.scale_up * self.context

    @property
    def expert_parallel(self) -> int:
        return self.scale_out * self.scale_up * self.context

    @property
    def table(self) -> Schedule | None:
        """The schedule's work; None without stages.

        Raises:
          ConfigError: it cannot have these sizes.
        """
        return table_of(self.schedule, self.pipe, self.micro_batches) if self.schedule and self.pipe > 1 else None

    def group_config(self, config: RunConfig) -> RunConfig:
        """The run as one stage's devices see it, with all layers.

        Raises:
          ConfigError: experts, groups or sequences do not divide.
        """
        mesh = MeshConfig(data=self.data, scale_out=self.scale_out, scale_up=self.scale_up, context=self.context,
                          zero="full" if self.zero == "full" else "zero1",
                          capacity_factor=config.mesh.capacity_factor, transport=config.mesh.transport,
                          combine=config.mesh.combine)
        batch = dataclasses.replace(config.batch, micro_batches=self.micro_batches, ramp_from=None)
        shards = self.data * self.scale_out * self.scale_up
        if batch.micro_batch % shards:
            raise ConfigError(f"batch.micro_batches ({self.micro_batches}) leaves {batch.micro_batch} sequences for "
                              f"{shards} devices that share a batch: make it divide {batch.sequences // shards}")
        return dataclasses.replace(config, mesh=mesh, batch=batch, precision=self.precision, recompute=self.recompute)

    def options(self) -> list[str]:
        """Command-line options that give a script this layout."""
        values = {"mesh.pipe": self.pipe, "mesh.data": self.data, "mesh.scale-out": self.scale_out,
                  "mesh.scale-up": self.scale_up, "mesh.context": self.context, "mesh.zero": self.zero,
                  "batch.micro-batches": self.micro_batches, "precision": self.precision, "recompute": self.recompute}
        if self.schedule is None:
            del values["mesh.pipe"]
        else:
            values["pipeline.schedule"] = self.schedule
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]
