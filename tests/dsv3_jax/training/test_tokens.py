import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.interop.tokenizer import Tokenizer, byte_tokenizer, deepseek_file
from dsv3_jax.training import tokens as module
from dsv3_jax.training.corpus import Document, read_corpus
from dsv3_jax.training.tokens import TokenData, TokenSplit, default_cache_dir, fim_split, prepare


def quiet(_: str) -> None:
    pass


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [f"Document {number}: naïve 你好 " + "word " * (number % 40) for number in range(2000)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(path=str(folder), tokenizer="bytes", validation_share=0.1, cache_dir=str(tmp_path / "cache"))


def documents(split: TokenSplit, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each document, without its begin and end."""
    ids = split.tokens.tolist()
    ends = [position for position, token in enumerate(ids) if token == tokenizer.eos]
    rows = [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
    assert all(row[0] == tokenizer.bos for row in rows)
    assert ends[-1] == len(ids) - 1
    return [row[1:] for row in rows]


@pytest.mark.parametrize(("tokenizer", "vocab_size", "dtype"), [
    ("bytes", 261, np.uint16), ("bpe", 500, np.uint16), ("deepseek", 129280, np.uint32)
])
def test_every_document_comes_back(data: DataConfig, tokenizer: str, vocab_size: int, dtype) -> None:
    data = dataclasses.replace(data, tokenizer=tokenizer)
    result = prepare(data, vocab_size, 0, quiet)
    assert result.tokenizer is not None
    corpus = read_corpus(data)
    for split, expected in ((result.train, list(corpus.train)), (result.validation, list(corpus.validation))):
        texts = [document.text for document in expected]
        assert [result.tokenizer.decode(row) for row in documents(split, result.tokenizer)] == texts
        assert split.tokens.dtype == dtype
        assert isinstance(split.tokens, np.memmap)
        assert (split.documents, split.text_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert split.bytes_per_token == sum(len(text.encode()) for text in texts) / len(split.tokens)


def test_the_vocabulary_is_checked_on_a_cached_entry_too(data: DataConfig) -> None:
    # The packaged file as it is, with the tokens of later models.
    data = dataclasses.replace(data, tokenizer=str(deepseek_file()))
    prepare(data, 129280, 0, quiet)
    with pytest.raises(ConfigError, match=r"model\.vocab_size \(128815\) must be at least the 129280 tokens"):
        prepare(data, 128815, 0, quiet)


def test_fill_in_the_middle_loses_nothing(data: DataConfig) -> None:
    data = dataclasses.replace(data, fim_rate=0.3)
    result = prepare(data, 261, 7, quiet)
    corpus, tokenizer = read_corpus(data), result.tokenizer
    assert tokenizer is not None
    assert tokenizer.fim is not None
    begin, hole, end = tokenizer.fim
    rearranged = 0
    for row, document in zip(documents(result.train, tokenizer), corpus.train, strict=True):
        if row[0] == begin:
            rearranged += 1
            at_hole, at_end = row.index(hole), row.index(end)
            prefix, suffix, middle = row[1:at_hole], row[at_hole + 1:at_end], row[at_end + 1:]
            row = prefix + middle + suffix
        assert tokenizer.decode(row) == document.text
    assert abs(rearranged / 1800 - 0.3) < 4 * (0.3 * 0.7 / 1800) ** 0.5  # four standard deviations
    for row, document in zip(documents(result.validation, tokenizer), corpus.validation, strict=True):
        assert tokenizer.decode(row) == document.text
    assert result.train.text_bytes == sum(len(document.text.encode()) for document in corpus.train)


def test_fim_split_depends_on_seed_and_name_only() -> None:
    cuts = [fim_split(Document(f"name {number}", "x" * 100), 1.0, 3) for number in range(500)]
    assert cuts == [fim_split(Document(f"name {number}", "y" * 100), 1.0, 3) for number in range(500)]
    assert cuts != [fim_split(Document(f"name {number}", "x" * 100), 1.0, 4) for number in range(500)]
    assert all(cut is not None and 0 <= cut[0] <= cut[1] <= 100 for cut in cuts)
    first, second = np.mean(np.asarray(cuts), axis=0)
    # The lower and upper of two uniform positions lie at a third and two thirds; standard deviation of the mean 1.05.
    assert abs(first - 100 / 3) < 4.2
    assert abs(second - 200 / 3) < 4.2
    assert fim_split(Document("name", "text"), 0.0, 3) is None


def entries(data: DataConfig) -> set[str]:
    assert data.cache_dir is not None
    return {path.name for path in Path(data.cache_dir).iterdir()}


def test_the_cache_is_used_while_nothing_changes(data: DataConfig, monkeypatch) -> None:
    first = prepare(data, 261, 0, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make_entry", lambda *_: pytest.fail("made anew"))
        again = prepare(data, 300, 1, quiet)  # neither matters to a byte tokenizer without fill-in-the-middle
    np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
    assert len(entries(data)) == 1
    assert data.path is not None
    changes = [
        (dataclasses.replace(data, fim_rate=0.1), 261, 0), (dataclasses.replace(data, fim_rate=0.1), 261, 1),
        (dataclasses.replace(data, tokenizer="bpe"), 300, 0), (dataclasses.replace(data, tokenizer="bpe"), 301, 0),
        (dataclasses.replace(data, validation_share=0.2), 261, 0),
    ]
    for number, (changed, vocab_size, seed) in enumerate(changes, start=2):
        prepare(changed, vocab_size, seed, quiet)
        assert len(entries(data)) == number
    (Path(data.path) / "b.txt").write_text("more")
    more = prepare(data, 261, 0, quiet)
    assert len(more.train.tokens) + len(more.validation.tokens) == (
        len(first.train.tokens) + len(first.validation.tokens) + len("more") + 2)


def test_a_crash_leaves_no_entry(data: DataConfig, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(data, 261, 0, quiet)
    assert entries(data) == set()
    prepare(data, 261, 0, quiet)


def _prepare_in_child(data: DataConfig, barrier, results) -> None:
    barrier.wait()
    results.put(int(np.asarray(prepare(data, 300, 0, quiet).train.tokens, np.int64).sum()))


def test_processes_may_race(data: DataConfig) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    children = [context.Process(target=_prepare_in_child, args=(data, barrier, results)) for _ in range(3)]
    for child in children:
        child.start()
    sums = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(sums) == 1
    assert len(entries(data)) == 1


def test_a_loser_of_the_race_uses_the_winner(data: DataConfig, monkeypatch) -> None:
    genuine = module._write_splits

    def slow(*args):
        """Another process finishes while this one still writes."""
        monkeypatch.setattr(module, "_write_splits", genuine)
        prepare(data, 261, 0, quiet)
        return genuine(*args)

    monkeypatch.setattr(module, "_write_splits", slow)
    result = prepare(data, 261, 0, quiet)
    assert len(entries(data)) == 1
    assert result.train.documents is not None


def test_a_damaged_entry_is_named(data: DataConfig) -> None:
    prepare(data, 261, 0, quiet)
    assert data.cache_dir is not None
    (file,) = Path(data.cache_dir).glob("*/train.bin")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"train\.bin has \d+ bytes, meta\.json says \d+; delete"):
        prepare(data, 261, 0, quiet)


def test_nothing_held_out(data: DataConfig) -> None:
    result = prepare(dataclasses.replace(data, validation_share=0.0), 261, 0, quiet)
    assert len(result.validation.tokens) == 0
    assert result.validation.bytes_per_token is None
    assert result.train.documents == 2000


def test_fim_needs_its_tokens(data: DataConfig, tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "plain.json")
    text = (tmp_path / "plain.json").read_text().replace("fim_", "other_")
    (tmp_path / "plain.json").write_text(text)
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "plain.json"), fim_rate=0.1)
    with pytest.raises(ConfigError, match=r"data\.fim_rate \(0\.1\) must be 0: data\.tokenizer \(.*plain\.json\)"):
        prepare(data, 261, 0, quiet)


def test_progress_tells_what_is_left(data: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_REPORTS", 0.0)
    lines: list[str] = []
    prepare(data, 261, 0, lines.append)
    assert [line.split(", ")[0] for line in lines] == ["tokenizing: 1,024 documents", "tokenizing: 2,000 documents"]
    assert lines[-1].endswith("0.3 of 0.3 MB, 0 s left")


def test_default_cache(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert default_cache_dir() == Path("/some/cache/dsv3_jax/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/dsv3_jax/tokens"


def load_ids(tmp_path: Path, ids: np.ndarray, vocab_size: int, **settings) -> TokenData:
    np.save(tmp_path / "ids.npy", ids)
    return prepare(DataConfig(path=str(tmp_path / "ids.npy"), **settings), vocab_size, 0, quiet)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_ids_are_used_as_they_are(tmp_path: Path, dtype) -> None:
    result = load_ids(tmp_path, np.arange(101, dtype=dtype), 101, validation_share=0.1)
    assert result.tokenizer is None
    assert result.train.bytes_per_token is None
    assert result.train.tokens.dtype == dtype
    assert isinstance(result.train.tokens, np.memmap)
    assert result.train.tokens.tolist() == list(range(90))
    assert result.validation.tokens.tolist() == list(range(90, 101))


@pytest.mark.parametrize(("ids", "settings", "message"), [
    (np.arange(100), {}, r"id 50 at position 50 is outside \[0, model\.vocab_size=50\); raise"),
    (np.array([3, 4, 5, -1]), {}, r"id -1 at position 3 is outside"),
    (np.zeros((2, 3), np.int32), {}, r"has shape \(2, 3\) and dtype int32"),
    (np.zeros(3, np.float32), {}, r"dtype float32"),
    (np.zeros(0, np.int32), {}, r"has shape \(0,\)"),
    (np.array([{}]), {}, r"cannot be read as a \.npy file"),
    (np.arange(9), {"fim_rate": 0.1}, r"data\.fim_rate \(0\.1\) must be 0 for the token ids"),
])
def test_bad_ids(tmp_path: Path, monkeypatch, ids: np.ndarray, settings: dict, message: str) -> None:
    monkeypatch.setattr(module, "_CHECK_IDS", 3)
    with pytest.raises(ConfigError, match=message):
        load_ids(tmp_path, ids, 50, **settings)


def test_missing_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path \(.*none\.npy\) cannot be read"):
        prepare(DataConfig(path=str(tmp_path / "none.npy")), 50, 0, quiet)
