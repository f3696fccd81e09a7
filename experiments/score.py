"""Logits and log-probabilities of given tokens: a model's answer in numbers, to compare with another program's.

  python experiments/score.py runs/quickstart --tokens ids.npy --out scores.npz
  python experiments/score.py DeepSeek-V2-Lite --tokens speech.txt --out scores.npz --no-logits

Takes run folders of experiments/train.py, published models and Orbax folders of weights. The file holds

  tokens    int32   [B, T]     what was scored
  logits    float32 [B, T, V]  of the token after each position, given all up to it
  logprobs  float32 [B, T-1]   natural logarithm of the probability of tokens 1..T-1, each given those before it
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.mesh import batch_sharding, batch_shards, gather_for_compute
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import model_structure
from dsv3_jax.training.metrics import duration
from experiments.command_line import finish, say_line, standard_output_for_json
from experiments.inference_options import FolderOptions, Loaded, load_for_inference, tokenizer_in


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to score, with which model."""

    folder: Annotated[FolderOptions, tyro.conf.arg(name="")]
    tokens: Path
    """A .npy file of token ids, [B, T] or [T]; or a text file, scored as one row after the tokenizer's begin token."""
    out: Path
    """The .npz file to write."""
    logits: bool = True
    """Write the logits too: 4 bytes times the vocabulary for each token."""
    rows: int = 1
    """Rows computed at once, rounded up to a multiple of the mesh's data*scale_out*scale_up."""
    json: bool = False
    """Print one JSON object with the mean log-probability and where the scores are."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.out.suffix != ".npz":
        raise ConfigError(f"--out ({arguments.out}) must end in .npz")
    if arguments.rows < 1:
        raise ConfigError(f"--rows ({arguments.rows}) must be at least 1")
    tokens_BT = read_tokens(arguments.tokens, arguments.folder.folder)
    with standard_output_for_json(arguments.json) as write_json:
        loaded = load_for_inference(arguments.folder)
        check_tokens(tokens_BT, loaded.model, arguments.tokens)
        logprobs_BT = write_scores(arguments, loaded, tokens_BT)
        told = {"out": str(arguments.out), "source": loaded.source, "precision": loaded.precision,
                "rows": tokens_BT.shape[0], "tokens": tokens_BT.shape[1], "vocabulary": loaded.model.vocab_size,
                "mean_logprob": float(logprobs_BT.mean()) if logprobs_BT.size else None}
        say_line(f"done: {arguments.out}, {told['rows']} rows of {told['tokens']} tokens, mean log-probability "
                 f"{told['mean_logprob']}, {loaded.source} in {loaded.precision}")
        write_json(told)


def read_tokens(path: Path, folder: Path) -> np.ndarray:
    """int32 [B, T] from a .npy file of ids, or from a text.

    Raises:
      ConfigError: no such file, or none of integers in one or two dimensions.
    """
    if not path.is_file():
        raise ConfigError(f"--tokens ({path}) is not a file: give a .npy file of token ids, or a text")
    if path.suffix != ".npy":
        tokenizer = tokenizer_in(folder)
        return np.array([[tokenizer.bos, *tokenizer.encode(path.read_text(encoding="utf-8"))]], np.int32)
    try:
        tokens = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"--tokens ({path}) is no .npy file of numbers: {error}") from error
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2) or tokens.size == 0:
        raise ConfigError(f"--tokens ({path}) holds {tokens.dtype} of shape {list(tokens.shape)}: give integers [B, T]")
    if not np.array_equal(tokens, tokens.astype(np.int32)):
        raise ConfigError(f"--tokens ({path}) has ids beyond 32 bits")
    return np.atleast_2d(tokens).astype(np.int32)


def check_tokens(tokens_BT: np.ndarray, model: ModelConfig, path: Path) -> None:
    """Raises `ConfigError` for ids that the model does not have, or more tokens than its window."""
    if tokens_BT.min() < 0 or tokens_BT.max() >= model.vocab_size:
        bad = tokens_BT.max() if tokens_BT.min() >= 0 else tokens_BT.min()
        raise ConfigError(f"--tokens ({path}) has id {bad} outside the model's vocabulary of {model.vocab_size}: use "
                          "the model's own tokenizer")
    if tokens_BT.shape[1] > model.max_position_embeddings:
        raise ConfigError(f"--tokens ({path}) has rows of {tokens_BT.shape[1]} tokens, more than the model's window of "
                          f"{model.max_position_embeddings} (max_position_embeddings): cut them")


def write_scores(arguments: Arguments, loaded: Loaded, tokens_BT: np.ndarray) -> np.ndarray:
    """Writes the file, batch by batch, under a temporary name until it is complete; returns the log-probabilities."""
    rows, length = tokens_BT.shape
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    logprobs_BT = np.empty((rows, length - 1), np.float32)
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive, contextlib.ExitStack() as stack:
            _write(archive, "tokens", tokens_BT)
            logits_file = None
            if arguments.logits:
                logits_file = stack.enter_context(_begin(archive, "logits", (rows, length, loaded.model.vocab_size)))
            began, done = time.perf_counter(), 0
            for logits_bTV, logprobs_bT in score(loaded, tokens_BT, arguments.rows):
                if logits_file is not None:
                    logits_file.write(np.ascontiguousarray(logits_bTV).data)
                logprobs_BT[done:done + len(logprobs_bT)] = logprobs_bT
                done += len(logprobs_bT)
                left = (time.perf_counter() - began) / done * (rows - done)
                say_line(f"scored rows {done}/{rows} mean_logprob {logprobs_BT[:done].mean():.4f} eta {duration(left)}")
            stack.close()
            _write(archive, "logprobs", logprobs_BT)
        partial.replace(arguments.out)
    finally:
        partial.unlink(missing_ok=True)
    return logprobs_BT


def _begin(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> Any:
    """A float32 array of the archive, open for its values."""
    file: IO[bytes] = archive.open(f"{name}.npy", "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def score(loaded: Loaded, tokens_BT: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """float32 (logits [b, T, V], log-probabilities [b, T-1]) of `rows` rows at a time, by one compiled program."""
    mesh, config = loaded.mesh, loaded.model
    structure = model_structure(config, loaded.precision)

    @jax.jit
    def run(params: nnx.State, router_bias: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(structure, gather_for_compute(params), router_bias)
        logits = gathered(model.lm_head)(model(tokens, mtp=False).hidden_BTD)
        logprobs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return logits, jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]

    rows = -(-rows // batch_shards(mesh)) * batch_shards(mesh)
    for start in range(0, len(tokens_BT), rows):
        batch = tokens_BT[start:start + rows]
        padded = np.concatenate([batch, np.zeros((rows - len(batch), batch.shape[1]), np.int32)])
        with jax.set_mesh(mesh):
            placed = jax.make_array_from_callback(padded.shape, batch_sharding(mesh), padded.__getitem__)
            logits, logprobs = run(loaded.params, loaded.router_bias, placed)
        yield np.asarray(logits)[:len(batch)], np.asarray(logprobs)[:len(batch)]


if __name__ == "__main__":
    finish(main)
