"""Weights that a new training run begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.store import Store
from dsv3_jax.interop.tokenizer import Tokenizer

# What does not change the meaning of a weight: initialisation, training's own weights and lengths, and what published
# files leave to the code.
_FREE = {"initializer_range", "aux_loss_alpha", "max_position_embeddings", "masked_group_score", "mtp_hidden"}


def open_weights(folder: Path, model: ModelConfig) -> Store:
    """The store in `folder`, which must hold the weights of `model`.

    Raises:
      ConfigError: it holds another model's, naming every field that differs; or see `open_store` and `Store.format`.
    """
    store = open_store(folder)
    theirs, ours = dataclasses.asdict(store.config), dataclasses.asdict(model)
    different = [f"{name}: {theirs[name]} there, {ours[name]} here" for name in ours
                 if theirs[name] != ours[name] and name not in _FREE]
    if different:
        raise ConfigError(f"--init-from {folder} holds another model: {'; '.join(different)}. Set --model.* (or the "
                          "preset) to its values")
    store.format()
    return store


def tokenizer_warning(store: Store, tokenizer: Tokenizer | None) -> Iterator[str]:
    """A line, if the weights come with another tokenizer than the run's."""
    theirs = next((path for path in store.companions if path.name == "tokenizer.json"), None)
    if theirs and tokenizer is not None and Tokenizer.load(theirs).fingerprint() != tokenizer.fingerprint():
        yield (f"WARNING: the weights come with another tokenizer than this run's data: --data.tokenizer {theirs} "
               "takes theirs")
