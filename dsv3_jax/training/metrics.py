"""What a run tells: a line a step for people, the same as JSON lines, and TensorBoard on request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.training.step import StepMetrics

Say = Callable[[str], None]


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def step_record(step: int, metrics: StepMetrics, *, learning_rate: float, seconds: float, tokens: int,
                bytes_per_token: float | None, peak_flops: float | None, flops_per_token: float,
                bytes_per_row: int) -> dict[str, Any]:
    """One step's numbers as plain Python values; blocks until the step is done.

    bits_per_byte is the training loss per byte of text (None when only token ids are known), mfu the share of the
    devices' bf16 peak that causal model FLOPs make up (None without a known peak). load_max_over_mean is the mean over
    MoE layers of the busiest expert's load over the average, dead_experts counts experts that got no token.
    dispatch_rounds above 1 means that routing exceeded `mesh.capacity_factor` somewhere and cost further rounds.
    dropped_choices are those of tokens for experts that never arrived there: always 0. nodes_per_token is the mean over
    tokens and layers; scale_out_bytes and scale_up_bytes are what the plans of all layers send over either network,
    over all devices, at `bytes_per_row` there and back, forward and backward.
    """
    told: StepMetrics = jax.tree.map(np.asarray, jax.device_get(metrics))
    load_LE = told.load_LE
    rate = tokens / seconds
    return {
        "step": step, "loss": float(told.losses.main), "mtp_loss": float(told.losses.mtp),
        "balance_loss": float(told.losses.balance),
        "bits_per_byte": None if bytes_per_token is None else float(told.losses.main) / math.log(2) / bytes_per_token,
        "grad_norm": float(told.grad_norm), "learning_rate": learning_rate, "step_ms": seconds * 1e3,
        "tokens_per_second": rate, "mfu": None if peak_flops is None else rate * flops_per_token / peak_flops,
        "load_max_over_mean": float(np.mean(load_LE.max(axis=-1) / load_LE.mean(axis=-1))),
        "dead_experts": int(np.sum(load_LE == 0)), "dispatch_rounds": int(told.dispatch_rounds),
        "dropped_choices": int(told.traffic.choices - told.traffic.delivered),
        "nodes_per_token": float(told.traffic.nodes / told.traffic.tokens),
        "scale_out_bytes": float(told.traffic.scale_out_rows) * bytes_per_row,
        "scale_up_bytes": float(told.traffic.scale_up_rows) * bytes_per_row,
    }


def check_finite(record: dict[str, Any], last_checkpoint: int | None) -> None:
    """Raises `Diverged`, naming the step range and the last good checkpoint, if the step was not finite."""
    if math.isfinite(record["loss"]) and math.isfinite(record["mtp_loss"]) and math.isfinite(record["grad_norm"]):
        return
    kept = (f"the checkpoint of step {last_checkpoint} is the last good one and was kept" if last_checkpoint is not None
            else "no checkpoint had been written")
    raise Diverged(f"loss {record['loss']}, mtp_loss {record['mtp_loss']}, grad_norm {record['grad_norm']} at step "
                   f"{record['step']}: the run went wrong between steps {(last_checkpoint or 0) + 1} and "
                   f"{record['step']}; {kept}. Lower schedule.peak_learning_rate or optimizer.gradient_clip, or look "
                   "at the data of these steps")


def duration(seconds: float) -> str:
    """'1h02m', '3m05s' or '12s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def step_line(record: dict[str, Any], steps: int, eta: float) -> str:
    """The greppable line of a step."""
    r = record
    bits = "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.3f}"
    mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
    return (f"step {r['step']}/{steps} loss {r['loss']:.4f} mtp_loss {r['mtp_loss']:.4f} bits_per_byte {bits} "
            f"grad_norm {r['grad_norm']:.3f} lr {r['learning_rate']:.2e} ms/step {r['step_ms']:.0f} "
            f"tokens/s {r['tokens_per_second']:.0f} mfu {mfu} load_max/mean {r['load_max_over_mean']:.2f} "
            f"dead_experts {r['dead_experts']} dispatch_rounds {r['dispatch_rounds']} "
            f"nodes/token {r['nodes_per_token']:.2f} eta {duration(eta)}")


class RunLog:
    """Writes `metrics.jsonl` and `expert_load.jsonl` in a run folder, and TensorBoard events if asked.

    Only process 0 writes. A resumed run drops records after its starting step, which it will write again.
    """

    def __init__(self, run_dir: Path, start_step: int, tensorboard: bool):
        self._files: dict[str, Any] = {}
        self._tensorboard = None
        if jax.process_index() != 0:
            return
        for name in ("metrics", "expert_load"):
            path = run_dir / f"{name}.jsonl"
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step] if (
                path.exists() and start_step) else []
            path.write_text("".join(line + "\n" for line in kept))
            self._files[name] = path.open("a", buffering=1)
        if tensorboard:
            self._tensorboard = _tensorboard_writer(run_dir / "tensorboard")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record (with a `step`) to metrics.jsonl."""
        if "metrics" in self._files:
            self._files["metrics"].write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._tensorboard.add_scalar(name, value, record["step"])

    def write_load(self, step: int, metrics: StepMetrics) -> None:
        """Appends the share of tokens that each expert of each layer got."""
        if "expert_load" in self._files:
            load_LE = np.asarray(metrics.load_LE)
            share = load_LE / load_LE.sum(axis=-1, keepdims=True)
            self._files["expert_load"].write(json.dumps({"step": step, "share": np.round(share, 5).tolist()}) + "\n")

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _step_of(line: str) -> float:
    """The step of a JSON line; infinity for one that a crash cut off, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError('report.tensorboard needs tensorboardX: pip install "dsv3-jax[tensorboard]"') from error
    return SummaryWriter(str(folder))
