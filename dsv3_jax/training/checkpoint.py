"""Checkpoints with Orbax: asynchronous, atomic, independent of the mesh they were written on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, ModelConfig, RunConfig, to_json
from dsv3_jax.training.schedule import Position
from dsv3_jax.training.state import TrainState, abstract_state

FORMAT = "dsv3_jax training state 1"

CHUNK_BYTES = 64 << 20
"""Largest piece of an array that a reader has to take as a whole."""

# Settings that may change between the parts of one run: where and how it runs, not what it computes.
_FREE = ("mesh.", "report.", "checkpoint.", "distributed.", "steps", "recompute", "data.cache_dir")


def differing_fields(saved: dict[str, Any], config: RunConfig, free: tuple[str, ...] = _FREE) -> list[str]:
    """'field: saved value -> new value' for every setting that makes `config` another run than `saved`.

    What `saved` does not name of the model it was written before; it has the default.

    Args:
      free: how the names of settings begin that may differ.
    """
    defaults = {f"model.{field.name}": field.default for field in dataclasses.fields(ModelConfig)
                if field.default is not dataclasses.MISSING}
    old, new = {**defaults, **_flatten(saved)}, _flatten(dataclasses.asdict(config))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and not name.startswith(free)]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def named_leaves(state: TrainState) -> dict[str, Any]:
    """The state as one flat dictionary, 'params/moe_layers/self_attn/...' -> leaf: what a checkpoint holds."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _chunks(leaf: jax.Array) -> ocp.SaveArgs:
    """How the files divide an array: a large stack by layers and experts, so that a converter can read one matrix."""
    if leaf.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(leaf.ndim - 2)))


class Checkpoints:
    """The checkpoints of one run folder.

    A checkpoint holds the whole `TrainState` under flat names, and the configuration and data position as JSON. It is
    written beside its final name and renamed when complete, so a crash never leaves a half checkpoint behind.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), enable_async_checkpointing=True))

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: RunConfig, position: Position) -> None:
        """Starts writing; the state may be donated as soon as this returns."""
        about = {"format": FORMAT, "config": dataclasses.asdict(config), "position": dataclasses.asdict(position)}
        leaves = named_leaves(state)
        self._manager.save(position.step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(leaves, save_args=jax.tree.map(_chunks, leaves)),
            about=ocp.args.JsonSave(about)))

    def restore(self, config: RunConfig, mesh: Mesh, step: int | None = None) -> tuple[TrainState, Position]:
        """The state of `step` (default: the latest), laid out for `mesh`.

        Raises:
          ConfigError: no such checkpoint, one of another run or program, or one that cannot be read.
        """
        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        if step is None or step not in steps:
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are {steps or 'none'}")
        about = self._about(step)
        different = differing_fields(about["config"], config)
        if different:
            raise ConfigError(f"checkpoint {self.folder / str(step)} belongs to another configuration: "
                              f"{'; '.join(different)}. Use another --run-dir, or the saved values")
        target = abstract_state(config, mesh)
        try:
            leaves = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(named_leaves(target)))).state
        except Exception as error:
            raise self._unreadable(step, error) from error
        state = jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in named_leaves(target)])
        # Orbax may hand back buffers that it still holds; a copy can be donated to the step.
        state = jax.tree.map(lambda x: x.copy(), state)
        return state, Position(**about["position"])

    def _about(self, step: int) -> dict[str, Any]:
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        except Exception as error:
            raise self._unreadable(step, error) from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise self._unreadable(step, ValueError(f"its format is not '{FORMAT}'"))
        return about

    def _unreadable(self, step: int, error: Exception) -> ConfigError:
        """The error for a truncated or foreign checkpoint, with the remedy."""
        earlier = [s for s in self.steps() if s < step]
        remedy = (f"resume from the previous one with --resume-from {earlier[-1]}" if earlier else
                  "there is no earlier one: start again with another --run-dir")
        reason = " ".join(str(error).split())[:300]
        return ConfigError(f"checkpoint {self.folder / str(step)} cannot be read (truncated, or not written by this "
                           f"program): {reason}. To go on, {remedy}")

    def drop_after(self, step: int) -> list[int]:
        """Deletes checkpoints later than `step`, so that a run resumed there can write its own."""
        late = [s for s in self.steps() if s > step]
        for s in late:
            self._manager.delete(s)
        return late

    def finish(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the writers."""
        self._manager.close()


def open_run_folder(run_dir: Path, config: RunConfig) -> None:
    """Makes the folder, or checks that it is of the same run; writes the resolved configuration into it.

    Raises:
      ConfigError: the folder belongs to another configuration; the differing fields are named.
    """
    path = run_dir / "config.json"
    if path.exists():
        try:
            different = differing_fields(json.loads(path.read_text()), config)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a configuration this program wrote ({error}): use another "
                              "--run-dir") from error
        if different:
            raise ConfigError(f"--run-dir {run_dir} holds a run of another configuration: {'; '.join(different)}. "
                              "Use another --run-dir, or the saved values")
    run_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        path.write_text(to_json(config))
