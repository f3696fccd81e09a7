"""The training loop: data, steps, reports, checkpoints, and how a run stops and resumes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.codesign.counting import count_parameters, training_flops_per_token
from dsv3_jax.codesign.hardware import peak_bf16_flops
from dsv3_jax.config import RunConfig
from dsv3_jax.expert_parallel.exchange import row_bytes
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.interop.load import load
from dsv3_jax.interop.start import open_weights, tokenizer_warning
from dsv3_jax.mesh import batch_sharding, make_mesh
from dsv3_jax.nn.moe import wire_of
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES
from dsv3_jax.training import runtime
from dsv3_jax.training.batches import Batches
from dsv3_jax.training.checkpoint import Checkpoints, open_run_folder
from dsv3_jax.training.evaluate import Evaluator
from dsv3_jax.training.metrics import RunLog, Say, check_finite, duration, step_line, step_record
from dsv3_jax.training.pipelined import check_step
from dsv3_jax.training.schedule import Position, StepSettings, walk
from dsv3_jax.training.state import TrainState, init_state, init_state_from
from dsv3_jax.training.step import StepMetrics, compile_train_step
from dsv3_jax.training.tokens import TokenData, prepare

LOAD_SNAPSHOTS = 100
"""About how many times a run writes the load of every expert, for the heat map."""


@dataclasses.dataclass
class _Pending:
    """A step on its way: dispatched, not yet reported."""

    position: Position
    """After the step."""
    sequences: int
    settings: StepSettings
    metrics: StepMetrics


class Trainer:
    """One run in one folder; `run()` does all of it."""

    def __init__(self, config: RunConfig, run_dir: Path, say: Say = print, resume_from: int | None = None,
                 init_from: Path | None = None):
        self.config, self.run_dir = config, run_dir
        self.say: Say = say if jax.process_index() == 0 else lambda line: None
        self.mesh = make_mesh(config.mesh)
        check_step(config, self.mesh)
        self._weights = None if init_from is None else open_weights(init_from, config.model)
        open_run_folder(run_dir, config)
        self.data: TokenData = prepare(config.data, config.model.vocab_size, config.seed, self.say)
        self._lookahead = 1 + config.model.num_nextn_predict_layers
        self.batches = Batches(self.data.train.tokens, config.batch.sequence_length, self._lookahead, config.seed)
        if self.data.tokenizer is not None and jax.process_index() == 0:
            self.data.tokenizer.save(run_dir / "tokenizer.json")
        runtime.wait_for_processes("data is ready")
        self.checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep)
        self.resume_from = resume_from
        self._flops = training_flops_per_token(config.model, config.batch.sequence_length)
        self._bytes_per_row = _bytes_per_row(config)
        peak = peak_bf16_flops(self.mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * self.mesh.size
        self._last_good: int | None = None
        self._record: dict[str, Any] = {}
        self._evaluation: dict[str, float] = {}
        self._evaluated: int | None = None
        self._clock = self._pace = 0.0

    def run(self) -> dict[str, Any]:
        """Trains to `config.steps`, or to a signal; returns a summary of plain values."""
        self._banner()
        state, start = self._start_state()
        if start.step >= self.config.steps:
            self.say(f"nothing left to train: step {start.step} of {self.config.steps}; raise --steps to go on")
        log = RunLog(self.run_dir, start.step, self.config.report.tensorboard)
        compiling = time.perf_counter()
        self.say("compiling ...")
        step = compile_train_step(self.config, self.mesh)
        self.evaluator = (Evaluator(self.config, self.mesh, self.data.validation)
                          if len(self.data.validation.tokens) else None)
        self.generator = Generator(self.config.model, self.mesh, precision=self.config.precision,
                                   spread=self.config.mesh.gathers_by_layer)
        runtime.wait_for_processes("step is compiled")
        compile_seconds = time.perf_counter() - compiling
        self.say(f"compiling ... done in {compile_seconds:.1f} s")
        try:
            with _StopOnSignal() as stop:
                state, position = self._steps(step, state, start, log, stop)
            self._finish(state, position, log)
        finally:
            self.checkpoints.close()
            log.close()
        return {"run_dir": str(self.run_dir), "finished": position.step >= self.config.steps, **self._record,
                **self._evaluation,
                "step": position.step, "resumed_from": start.step, "compile_seconds": compile_seconds}

    def _start_state(self) -> tuple[TrainState, Position]:
        if self.resume_from is None and not self.checkpoints.steps():
            return self._first_state(), Position()
        if self._weights is not None:
            self.say(f"--init-from {self._weights.where} has no effect: the run is past its beginning")
        state, position = self.checkpoints.restore(self.config, self.mesh, self.resume_from)
        dropped = self.checkpoints.drop_after(position.step)
        self.say(f"resuming from step {position.step} ({self.run_dir / 'checkpoints' / str(position.step)})"
                 + (f"; dropped later checkpoints {dropped}" if dropped else ""))
        self._last_good = position.step
        return state, position

    def _first_state(self) -> TrainState:
        if self._weights is None:
            return init_state(self.config, self.mesh)
        self.say(f"weights from {self._weights.where} ...")
        for line in tokenizer_warning(self._weights, self.data.tokenizer):
            self.say(line)
        began = time.perf_counter()
        params, router_bias = load(self._weights, self.mesh, say=self.say)
        self.say(f"weights from {self._weights.where} ... read in {time.perf_counter() - began:.1f} s")
        return init_state_from(self.config, self.mesh, params, router_bias)

    def _steps(self, step: Any, state: TrainState, start: Position, log: RunLog,
               stop: _StopOnSignal) -> tuple[TrainState, Position]:
        """Dispatches steps, reporting each while the next one runs."""
        report, every = self.config.report, self.config.checkpoint.every
        position, pending = start, None
        self._clock, self._pace = time.perf_counter(), 0.0
        for sequences, settings, tokens, micro_batches, position in self._prefetched(start):
            scalars = StepSettings(*(jnp.float32(value) for value in settings))
            state, metrics = step(state, tokens, micro_batches, scalars)
            if pending is not None:
                self._tell(pending, log)
            pending = _Pending(position, sequences, settings, metrics)
            due = [n for n in (every, report.evaluate_every, report.sample_every) if n and position.step % n == 0]
            stopping = stop.requested(position.step)
            if not (due or stopping or position.step == self.config.steps):
                continue
            self._tell(pending, log)
            pending = None
            if position.step % every == 0 and position.step < self.config.steps:
                self._save(state, position)
            if report.evaluate_every and position.step % report.evaluate_every == 0 and not stopping:
                self._evaluate(state, position, log)
            if report.sample_every and position.step % report.sample_every == 0:
                self._sample(state, position)
            self._clock = time.perf_counter()
            if stopping:
                self.say(f"stopping at step {position.step}: asked by a signal; the same command resumes")
                break
        return state, position

    def _prefetched(self, start: Position) -> Iterator[tuple[int, StepSettings, Any, Any, Position]]:
        """Each step's sequences, settings, tokens on the mesh, number of micro-batches, and position after it.

        A thread reads the next step's tokens while this one computes.
        """
        plan = walk(self.config, start)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            def submit() -> Any:
                upcoming = next(plan, None)
                return None if upcoming is None else (upcoming, reader.submit(self._tokens, *upcoming[:2]))
            ready = submit()
            while ready is not None:
                (position, sequences, settings), tokens = ready
                ready = submit()
                yield (sequences, settings, tokens.result(),
                       jnp.int32(sequences // self.config.batch.micro_batch), position.after(sequences))

    def _tokens(self, position: Position, sequences: int) -> jax.Array:
        """int32 [micro_batches, micro_batch, T + lookahead]; each process reads only the rows its devices hold.

        Processes whose devices share a sequence read the same rows; `Batches` gives all of them the same tokens.
        """
        batch = self.config.batch
        shape = (batch.micro_batches, batch.micro_batch, batch.sequence_length + self._lookahead)
        parts: dict[tuple[int, int], np.ndarray] = {}

        def rows(index: Any) -> np.ndarray:
            low, high, _ = index[1].indices(batch.micro_batch)
            if (low, high) not in parts:
                out = np.zeros((shape[0], high - low, shape[2]), np.int32)
                for m in range(sequences // batch.micro_batch):
                    first = position.sequences + m * batch.micro_batch
                    out[m] = self.batches.rows(first + low, first + high)
                parts[low, high] = out
            return parts[low, high]
        return jax.make_array_from_callback(shape, batch_sharding(self.mesh, leading=1), rows)

    def _tell(self, pending: _Pending, log: RunLog) -> None:
        tokens = pending.sequences * self.config.batch.sequence_length
        jax.block_until_ready(pending.metrics)
        now = time.perf_counter()
        done = pending.position.step
        self._record = step_record(
            done, pending.metrics, learning_rate=pending.settings.learning_rate, seconds=now - self._clock,
            tokens=tokens, bytes_per_token=self.data.train.bytes_per_token, peak_flops=self._peak,
            flops_per_token=self._flops, bytes_per_row=self._bytes_per_row)
        self._clock = now
        log.write(self._record)
        if done % max(1, self.config.steps // LOAD_SNAPSHOTS) == 0:
            log.write_load(done, pending.metrics)
        # The pace forgets: a slow first step or a busy machine does not spoil the estimate for long.
        self._pace = 0.95 * (self._pace or self._record["step_ms"]) + 0.05 * self._record["step_ms"]
        self.say(step_line(self._record, self.config.steps, (self.config.steps - done) * self._pace / 1e3))
        check_finite(self._record, self._last_good)

    def _save(self, state: TrainState, position: Position) -> None:
        if position.step not in self.checkpoints.steps():
            self.checkpoints.save(state, self.config, position)
        self._last_good = position.step

    def _evaluate(self, state: TrainState, position: Position, log: RunLog) -> None:
        if self.evaluator is None:
            return
        self._evaluation, self._evaluated = self.evaluator(state.params, state.router_bias), position.step
        log.write({"step": position.step, **self._evaluation})
        self.say(f"evaluation step {position.step} " + " ".join(f"{k} {v:.4f}" for k, v in self._evaluation.items()))

    def _sample(self, state: TrainState, position: Position) -> None:
        tokenizer, report = self.data.tokenizer, self.config.report
        if tokenizer is None:
            return
        # A run must not end because its sample is long: it gets half the window, and the prompt's end what is left.
        tokens = max(1, min(report.sample_tokens, self.generator.window // 2))
        prompt = [tokenizer.bos, *tokenizer.encode(report.sample_prompt)][tokens - self.generator.window:]
        seed = (int(np.asarray(state.rng.addressable_data(0))[-1]) + position.step) % 2 ** 32
        weights = self.generator.prepare(state.params, state.router_bias)
        [ids] = self.generator.generate(weights, [np.array(prompt)], tokens, Sampling(temperature=0.8, seed=seed),
                                        [tokenizer.eos]).run()
        self.say(f"sample step {position.step} {json.dumps(report.sample_prompt + tokenizer.decode(ids))}")

    def _finish(self, state: TrainState, position: Position, log: RunLog) -> None:
        """Last checkpoint and, if the run is over, last evaluation."""
        self._save(state, position)
        if position.step >= self.config.steps and self._evaluated != position.step:
            self._evaluate(state, position, log)
        self.checkpoints.finish()

    def _banner(self) -> None:
        config, devices = self.config, self.mesh.devices
        warning = runtime.idle_accelerator()
        if warning:
            self.say(f"WARNING: {warning}")
        count = count_parameters(config.model)
        sequences = config.batch.sequences
        first = devices.flat[0]
        self.say(f"dsv3_jax on jax {jax.__version__}, {devices.size} {first.platform} device(s) ({first.device_kind}), "
                 f"{jax.process_count()} process(es)")
        self.say("mesh " + " ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
                 + (f" schedule={config.pipeline.schedule}" if config.mesh.pipe > 1 else "")
                 + f" zero={config.mesh.zero} precision={config.precision} recompute={config.recompute}")
        self.say(f"parameters {count.main + count.mtp:,} total ({count.mtp:,} in multi-token prediction), "
                 f"{count.activated:,} activated in the main model")
        self.say(f"{sequences} sequences x {config.batch.sequence_length} = "
                 f"{sequences * config.batch.sequence_length:,} tokens a step, {config.steps} steps; "
                 f"training text {len(self.data.train.tokens):,} tokens, held out "
                 f"{len(self.data.validation.tokens):,}")
        self.say(f"run folder {self.run_dir}")


class _StopOnSignal:
    """Turns SIGINT and SIGTERM into a request to stop after the current step; a second one is immediate.

    With several processes the schedulers' SIGTERM is agreed on through `jax.distributed`, so that all stop at one step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(number, self._old[number])

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked


def _bytes_per_row(config: RunConfig) -> int:
    """What a row dispatched in the forward costs in a step: its way back, the backward's ways, and a second dispatch
    where recomputation asks for it."""
    each = row_bytes(config.model.hidden_size, jnp.dtype(COMPUTE_DTYPE[config.precision]).itemsize,
                     wire_of(RECIPES[config.precision], config.execution))
    return sum(each) + each.dispatch * (config.recompute in ("experts", "full"))


def train(config: RunConfig, run_dir: Path, say: Say = print, resume_from: int | None = None,
          init_from: Path | None = None) -> dict[str, Any]:
    """Runs (or resumes) training in `run_dir` and returns its summary. Call `runtime.start` first.

    `init_from`: folder of weights that a new run begins with; see `dsv3_jax.interop.start.open_weights`.
    """
    began = time.perf_counter()
    summary = Trainer(config, run_dir, say, resume_from, init_from).run()
    summary["seconds"] = time.perf_counter() - began
    bits = summary.get("validation_bits_per_byte")
    if jax.process_index() == 0:
        say(f"done: step {summary['step']}/{config.steps} in {duration(summary['seconds'])}"
            + ("" if bits is None else f", validation bits per byte {bits:.4f}") + f", run folder {run_dir}")
    return summary
