"""A corpus as one long row of token ids per split, memory-mapped from a cache on disk.

A cache entry is a folder named by what it was made from:

    train.bin, validation.bin   ids, uint16 where the vocabulary fits, otherwise uint32
    meta.json                   dtype, tokens, bytes of text and documents of each split
    tokenizer.json

It is written under another name and renamed when whole: a crash leaves no half entry, and processes that race all end
with the one that was first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.interop.tokenizer import Tokenizer, check_vocabulary, deepseek_file, make_tokenizer
from dsv3_jax.training.corpus import Corpus, Document, read_corpus

BPE_TEXT_BYTES = 2**30
"""Training text that bpe learns from. More changes a vocabulary little and takes time and memory in proportion."""

_LAYOUT = 1
"""Part of the cache key; raise it when the same inputs would give other files."""
# Enough documents at once to keep every core busy, few enough to hold.
_BATCH_CHARACTERS = 2**22
_BATCH_DOCUMENTS = 1024
_CHECK_IDS = 2**24
_SECONDS_BETWEEN_REPORTS = 3.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TokenSplit:
    """Token ids [tokens] (uint16 or uint32; a .npy file's own dtype) and the size of the text behind them.

    `text_bytes` (UTF-8) and `documents` are None where only ids are known.
    """

    tokens: np.ndarray
    text_bytes: int | None
    documents: int | None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a token stands for, marks between documents counted; None where the text is unknown."""
        return None if self.text_bytes is None or len(self.tokens) == 0 else self.text_bytes / len(self.tokens)


@dataclass(frozen=True)
class TokenData:
    """Both splits, and the tokenizer that made them (None for a .npy file of ids)."""

    tokenizer: Tokenizer | None
    train: TokenSplit
    validation: TokenSplit


def prepare(data: DataConfig, vocab_size: int, seed: int, progress: Progress = print) -> TokenData:
    """Reads the cached tokens of `data`, or makes them.

    A document is its begin token, its tokens and its end token; documents follow each other without padding.

    Args:
        data: what to read and how.
        vocab_size: the model's; every id is below it.
        seed: draws the documents to rearrange for fill-in-the-middle; unused at `fim_rate` 0.
        progress: takes a line of text, at most every few seconds.

    Raises:
        ConfigError: the text, the ids, the tokenizer or the cache cannot be used.
        ImportError: a package of the extra `quickstart` is missing.
    """
    if data.path is not None and data.path.endswith(".npy"):
        return _read_ids(data, data.path, vocab_size)
    corpus = read_corpus(data)
    cache = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
    entry = cache / _fingerprint(data, corpus, vocab_size, seed)
    if not entry.is_dir():
        _make_entry(entry, data, corpus, vocab_size, seed, progress)
    return _read_entry(entry, data, vocab_size)


def default_cache_dir() -> Path:
    """`dsv3_jax/tokens` under $XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax" / "tokens"


def _fingerprint(data: DataConfig, corpus: Corpus, vocab_size: int, seed: int) -> str:
    """Names a cache entry by everything that decides its content."""
    def stamp(path: Path) -> tuple[str, int, int]:
        stat = path.stat()
        return str(path.resolve()), stat.st_size, stat.st_mtime_ns

    if data.tokenizer == "bpe":
        tokenizer: Any = vocab_size
    elif data.tokenizer == "bytes":
        tokenizer = None
    else:
        path = deepseek_file() if data.tokenizer == "deepseek" else Path(data.tokenizer)
        tokenizer = stamp(path) if path.is_file() else None
    settings = {
        "layout": _LAYOUT,
        "files": [stamp(path) for path in corpus.files],
        "tokenizer": [data.tokenizer, tokenizer, _version("tokenizers")],
        # Without fill-in-the-middle nothing is drawn, and runs of every seed share an entry.
        "fim": [data.fim_rate, seed] if data.fim_rate else None,
        "validation": data.validation_from_year if data.path is None else data.validation_share,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # making or loading the tokenizer raises the error that names the remedy


def _make_entry(entry: Path, data: DataConfig, corpus: Corpus, vocab_size: int, seed: int, progress: Progress) -> None:
    if data.tokenizer == "bpe":
        progress(f"training a bpe vocabulary of {vocab_size} tokens")
    tokenizer = make_tokenizer(data.tokenizer, corpus.training_texts(BPE_TEXT_BYTES), vocab_size)
    if data.fim_rate and tokenizer.fim is None:
        raise ConfigError(f"data.fim_rate ({data.fim_rate}) must be 0: data.tokenizer ({data.tokenizer}) has no "
                          "fill-in-the-middle tokens")
    draft = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        tokenizer.save(draft / "tokenizer.json")
        meta = {"tokenizer": tokenizer.fingerprint(), **_write_splits(draft, data, corpus, tokenizer, seed, progress)}
        (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        try:
            draft.rename(entry)
        except OSError:
            # Another process was first: a folder cannot replace one with files in it. Theirs has the same content.
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_splits(folder: Path, data: DataConfig, corpus: Corpus, tokenizer: Tokenizer, seed: int,
                  progress: Progress) -> dict[str, Any]:
    """Tokenizes everything in one pass; returns the splits' entries in meta.json."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    meta = {split: {"dtype": np.dtype(dtype).name, "tokens": 0, "text_bytes": 0, "documents": 0}
            for split in ("train", "validation")}
    report = _Report(corpus.source_bytes, progress)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        for batch in corpus.batches(_BATCH_CHARACTERS, _BATCH_DOCUMENTS):
            # Held-out text is never rearranged: its bits per byte are those of the text as written.
            splits = [None if held_out else fim_split(document, data.fim_rate, seed) for document, held_out in batch]
            rows = _encode([document for document, _ in batch], splits, tokenizer)
            for (document, held_out), ids in zip(batch, rows, strict=True):
                (validation if held_out else train).write(ids.astype(dtype).tobytes())
                count: dict[str, Any] = meta["validation" if held_out else "train"]
                count["tokens"] += len(ids)
                count["text_bytes"] += len(document.text.encode())
                count["documents"] += 1
            report.add(batch)
    return meta


def fim_split(document: Document, rate: float, seed: int) -> tuple[int, int] | None:
    """Where to cut a document into prefix, middle and suffix (character positions), or None to leave it whole.

    Depends on the seed and the document's name only, so neither order nor other documents matter.
    """
    if rate == 0:
        return None
    name = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big")
    random = np.random.default_rng([seed, name])
    if random.random() >= rate:
        return None
    first, second = sorted(random.integers(0, len(document.text) + 1, size=2).tolist())
    return first, second


def _encode(documents: list[Document], splits: list[tuple[int, int] | None], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each document with its marks; those with a split as prefix, suffix, middle (paper 2, section 4.1)."""
    pieces: list[str] = []
    for document, split in zip(documents, splits, strict=True):
        text = document.text
        pieces += [text] if split is None else [text[:split[0]], text[split[1]:], text[split[0]:split[1]]]
    encoded = iter(tokenizer.encode_batch(pieces))
    rows = []
    for split in splits:
        if split is None:
            parts: list[Any] = [[tokenizer.bos], next(encoded), [tokenizer.eos]]
        else:
            assert tokenizer.fim is not None, "checked before any document is read"
            begin, hole, end = tokenizer.fim
            parts = [[tokenizer.bos, begin], next(encoded), [hole], next(encoded), [end], next(encoded),
                     [tokenizer.eos]]
        rows.append(np.concatenate(parts))
    return rows


class _Report:
    """Says how far tokenizing is, at most every few seconds."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total, self._progress = total_bytes, progress
        self._done = self._documents = 0
        self._began = self._said = time.monotonic()

    def add(self, batch: list[tuple[Document, bool]]) -> None:
        self._documents += len(batch)
        self._done += sum(document.source_bytes for document, _ in batch)
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_REPORTS:
            return
        self._said = now
        left = (now - self._began) * (self._total - self._done) / self._done
        self._progress(f"tokenizing: {self._documents:,} documents, {self._done / 1e6:,.1f} of "
                       f"{self._total / 1e6:,.1f} MB, {left:,.0f} s left")


def _read_entry(entry: Path, data: DataConfig, vocab_size: int) -> TokenData:
    tokenizer = Tokenizer.load(entry / "tokenizer.json")
    check_vocabulary(data.tokenizer, tokenizer, vocab_size)
    meta = json.loads((entry / "meta.json").read_text())
    return TokenData(tokenizer, _read_split(entry, "train", meta), _read_split(entry, "validation", meta))


def _read_split(entry: Path, split: str, meta: dict[str, Any]) -> TokenSplit:
    path, values = entry / f"{split}.bin", meta[split]
    expected = values["tokens"] * np.dtype(values["dtype"]).itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise ConfigError(f"data.cache_dir: {path} has {size} bytes, meta.json says {expected}; delete {entry}")
    # A file of no bytes cannot be mapped.
    tokens: np.ndarray = (np.memmap(path, values["dtype"], mode="r") if size else np.zeros(0, values["dtype"]))
    return TokenSplit(tokens, values["text_bytes"], values["documents"])


def _read_ids(data: DataConfig, path: str, vocab_size: int) -> TokenData:
    """A .npy file used where it lies; its last `validation_share` of ids is held out."""
    if data.fim_rate:
        raise ConfigError(f"data.fim_rate ({data.fim_rate}) must be 0 for the token ids of data.path ({path}): "
                          "rearranging needs the text")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.path ({path}) cannot be read as a .npy file of token ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0:
        raise ConfigError(f"data.path ({path}) has shape {ids.shape} and dtype {ids.dtype}; token ids are one row of "
                          "integers: reshape(-1), and astype(np.uint16) or wider")
    for start in range(0, len(ids), _CHECK_IDS):
        chunk = ids[start:start + _CHECK_IDS]
        bad = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if len(bad):
            raise ConfigError(f"data.path ({path}): id {chunk[bad[0]]} at position {start + bad[0]} is outside "
                              f"[0, model.vocab_size={vocab_size}); raise model.vocab_size or tokenize the text anew")
    # Rounded up, so that a share above 0 holds something out.
    train = len(ids) - math.ceil(data.validation_share * len(ids))
    return TokenData(None, TokenSplit(ids[:train], None, None), TokenSplit(ids[train:], None, None))
