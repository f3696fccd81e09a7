"""Conversations as the text a model was trained to answer: the chat template that comes with a tokenizer.

A template is a Jinja program in `chat_template.jinja` or in the field `chat_template` of `tokenizer_config.json`. The
package jinja2 is in the extra `chat`, and runs it in a sandbox: a template is somebody else's program.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.tokenizer import Tokenizer

Message = dict[str, str]
"""role (system, user or assistant) and content."""


class ChatTemplate:
    """Renders messages, and turns the result into token ids.

    Attributes:
      stop_ids: tokens that end an answer.

    Raises:
      ConfigError: the folder has no template, or one that is no Jinja program.
      ImportError: jinja2 is not installed.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        settings = _settings(folder)
        source = _source(folder, settings)
        if source is None:
            raise ConfigError(f"{folder} has no chat template, neither chat_template.jinja nor the field chat_template "
                              "of tokenizer_config.json: use experiments/generate.py, or put the template that the "
                              "model was trained with there")
        self._tokenizer, self._folder = tokenizer, folder
        self._special = {name: _content(settings[name]) for name in ("bos_token", "eos_token")
                         if settings.get(name) is not None}
        self._special.setdefault("bos_token", tokenizer.decode([tokenizer.bos]))
        self._special.setdefault("eos_token", tokenizer.decode([tokenizer.eos]))
        self._template = _compiled(source, folder)
        eos = tokenizer.encode_with_special_tokens(self._special["eos_token"])
        self.stop_ids = sorted({tokenizer.eos, *(eos.tolist() if len(eos) == 1 else [])})

    def render(self, messages: list[Message]) -> str:
        """The text of a conversation up to where the model's answer begins.

        Raises:
          ConfigError: the template refuses the messages.
        """
        import jinja2
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {self._folder} refuses these messages: {error}") from error

    def encode(self, messages: list[Message]) -> np.ndarray:
        """`render` as token ids, int32 [tokens].

        Raises:
          ConfigError: a user's or system message spells a special token, which would forge the conversation's form.
        """
        for message in messages:
            forged = [name for name in self._tokenizer.special_tokens() if name in message["content"]]
            if forged and message["role"] != "assistant":
                raise ConfigError(f"the {message['role']} message spells the special token {forged[0]}: leave it out")
        return self._tokenizer.encode_with_special_tokens(self.render(messages))


def has_chat_template(folder: Path) -> bool:
    """Whether `ChatTemplate` finds one there."""
    return _source(folder, _settings(folder)) is not None


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _source(folder: Path, settings: dict[str, Any]) -> str | None:
    own_file = folder / "chat_template.jinja"
    return own_file.read_text() if own_file.is_file() else _default_template(settings.get("chat_template"))


def _default_template(field: Any) -> str | None:
    """The field is a template, or a list of named ones."""
    if isinstance(field, list):
        named = {each["name"]: each["template"] for each in field}
        return named.get("default")
    return field


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _compiled(source: str, folder: Path) -> Any:
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError('chat templates need the package jinja2: pip install "dsv3-jax[chat]"') from error

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)  # Jinja's own escapes HTML
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {folder} is no Jinja program, line {error.lineno}: {error}") from error
