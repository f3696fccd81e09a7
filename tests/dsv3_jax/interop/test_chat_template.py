"""Chat templates as they come with tokenizers, on a byte tokenizer."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.chat_template import ChatTemplate, has_chat_template
from dsv3_jax.interop.tokenizer import byte_tokenizer

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ message.content }}
    {%- elif message.role == "user" %}<|fim_begin|>{{ message.content | trim }}
    {%- elif message.role == "assistant" %}<|fim_end|>{{ message.content }}{{ eos_token }}
    {%- else %}{{ raise_exception("no role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|fim_end|>{% endif %}"""
BEGIN, END, USER, _, MODEL = range(256, 261)
TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": " a "}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}]


@pytest.mark.parametrize("place", ["jinja file", "string", "list of templates"])
def test_messages_become_the_templates_tokens(place, tmp_path):
    if place == "jinja file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        field = TEMPLATE if place == "string" else [{"name": "other", "template": "x"},
                                                    {"name": "default", "template": TEMPLATE}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"chat_template": field, "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}))
    assert has_chat_template(tmp_path)
    template = ChatTemplate(tmp_path, byte_tokenizer())
    assert template.encode(TALK).tolist() == [BEGIN, ord("S"), USER, ord("a"), MODEL, ord("b"), END, USER, ord("c"),
                                              MODEL]
    assert template.stop_ids == [END]


def test_text_elsewhere_still_spells_special_tokens_as_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = byte_tokenizer()
    ChatTemplate(tmp_path, tokenizer).encode(TALK)
    assert END not in tokenizer.encode("<|end_of_text|>")


def test_threads_that_render_leave_the_text_of_others_alone():
    """A server reads plain prompts while it renders conversations."""
    tokenizer = byte_tokenizer()
    done = threading.Event()

    def render():
        while not done.is_set():
            assert tokenizer.encode_with_special_tokens("<|end_of_text|>" * 2000).tolist() == [END] * 2000
    thread = threading.Thread(target=render)
    thread.start()
    try:
        assert all(END not in tokenizer.encode("<|end_of_text|>" * 100) for _ in range(300))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("template", "message", "words"), [
    (TEMPLATE, {"role": "tool", "content": ""}, "refuses these messages: no role tool"),
    (TEMPLATE, {"role": "user", "content": "x<|end_of_text|>"}, "user message spells the special token <|end_of_te"),
    ("{% if %}", None, "no Jinja program, line 1"),
    ("{{ ''.__class__.__mro__ }}", {"role": "user", "content": ""}, "refuses"),  # the sandbox holds
    (None, None, "has no chat template.*chat_template.jinja.*tokenizer_config.json"),
])
def test_what_cannot_be_rendered_is_told(template, message, words, tmp_path):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    assert has_chat_template(tmp_path) == (template is not None)
    with pytest.raises(ConfigError, match=words.replace("|", r"\|")):
        ChatTemplate(tmp_path, byte_tokenizer()).encode([message])


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "dsv3-jax\[chat\]"'):
        ChatTemplate(tmp_path, byte_tokenizer())
