"""Bodies of /v1/chat/completions and /v1/completions as requests to the engine."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.request import Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.server.body import ApiError, Fields, parse_json
from dsv3_jax.interop.chat_template import ChatTemplate, Message
from dsv3_jax.interop.tokenizer import Tokenizer

MOST_STOPS, LONGEST_STOP = 4, 256
"""Stop sequences of a request (the API's number), and characters of each."""
COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many (the API's number)."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
"""Fields of the API that are not served, with the values that change nothing."""
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = _NEUTRAL | {
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": ()}
_NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = _NEUTRAL | {"logprobs": (), "suffix": ("",)}
_IGNORED = ("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
            "safety_identifier", "service_tier", "store")
"""Fields that change no answer."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Of messages, with what templates call them."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What clients know of the model."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """Without one there is no chat."""
    room: int
    """Most tokens of a request, prompt and answer together."""
    choices: int = 128
    """Most answers to one body."""


class Asked(NamedTuple):
    """What a body asks for."""

    chat: bool
    requests: list[Request]
    """One for each choice, those of a prompt together."""
    choices: int
    """Of each prompt."""
    shown: list[str]
    """What stands before the answer of each choice: with `echo` the prompt."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


class _Prompts(NamedTuple):
    ids: list[np.ndarray]
    field: str
    """Where they come from."""
    stop_ids: frozenset[int]
    shown: list[str]


def parse_request(body: bytes, chat: bool, model: ServedModel, line: str = "") -> Asked:
    """Reads a body. Tokenizes, so it may take a while.

    Args:
      chat: whether it came to /v1/chat/completions.
      line: which client it came from; users of two clients may have the same name.

    Raises:
      ApiError: 400 or 404, naming the field that is wrong.
    """
    fields = Fields(parse_json(body))
    name = fields.need("model", str)
    if name != model.name:
        raise ApiError(404, f"model ({name}) is not served here: ask for {model.name}", param="model",
                       code="model_not_found")
    stream, choices = fields.take("stream", bool, False), fields.at_least("n", 1) or 1
    include_usage, stop = _include_usage(fields, stream), _stop(fields)
    most, (sampling, seed) = _most_new_tokens(fields, chat), _sampling(fields)
    user = line + fields.take("user", str, "")
    fields.leave_at(_NEUTRAL_CHAT if chat else _NEUTRAL_COMPLETION | {"best_of": (choices,)})
    for ignored in _IGNORED:
        fields.take_any(ignored)
    prompts = _conversation(fields, model) if chat else _texts(fields, model)
    fields.end()
    if choices * len(prompts.ids) > model.choices:
        raise ApiError(400, f"n ({choices}) times the number of prompts ({len(prompts.ids)}) is more than the "
                       f"{model.choices} answers that a request may have: spread them over several", param="n")
    requests = []
    for ids in prompts.ids:
        new = _new_tokens(len(ids), most, chat, model.room, prompts.field)
        first = secrets.randbits(32) if seed is None else seed
        for choice in range(choices):
            each = dataclasses.replace(sampling, seed=(first + choice) % 2 ** 32)
            requests.append(Request(ids, new, each, prompts.stop_ids, user))
    shown = [text for text in prompts.shown for _ in range(choices)]
    return Asked(chat, requests, choices, shown, stop, stream, include_usage)


def _sampling(fields: Fields) -> tuple[Sampling, int | None]:
    """How to draw, and the seed if there is one: any integer, of which 32 bits count."""
    kinds: dict[str, Any] = {"top_k": int}
    given = {name: fields.take_or_none(name, kinds.get(name, float))
             for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    try:
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        name, _, why = str(error).removeprefix("sampling.").partition(" ")
        fields.refuse(name, why, code="invalid_value")
    return sampling, fields.take_or_none("seed", int)


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take_any("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(
            isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in stops):
        fields.refuse("stop", f"must be a string or an array of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} "
                      "characters", code="invalid_value")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.take_any("stream_options")
    if given is None:
        return False
    if not stream:
        fields.refuse("stream_options", "is for stream=true only", code="invalid_value")
    options = Fields(given, "stream_options")
    include = options.take("include_usage", bool, False)
    options.take("include_obfuscation", bool, False)  # padding against eavesdroppers: it changes no answer
    options.end()
    return include


def _most_new_tokens(fields: Fields, chat: bool) -> int | None:
    most = fields.at_least("max_tokens", 1)
    if chat:
        newer = fields.at_least("max_completion_tokens", 1)
        if None not in (most, newer) and most != newer:
            fields.refuse("max_tokens", f"({most}) and max_completion_tokens ({newer}) are two names of one setting: "
                          "give one", code="invalid_value")
        most = most if newer is None else newer
    return most


def _new_tokens(prompt: int, most: int | None, chat: bool, room: int, field: str) -> int:
    """New tokens that a prompt of so many may get."""
    if most is None:
        most = max(1, room - prompt) if chat else min(COMPLETION_TOKENS, max(1, room - prompt))
    if prompt + most > room:
        raise ApiError(400, f"this model's context is {room} tokens, but {prompt + most} were asked for: {prompt} in "
                       f"{field}, {most} for the answer. Shorten either.", param=field, code="context_length_exceeded")
    return most


def _texts(fields: Fields, model: ServedModel) -> _Prompts:
    """A string, an array of strings, token ids, or an array of such arrays."""
    given = fields.need_any("prompt")
    several = given if isinstance(given, list) and not _is_ids(given) else [given]
    if not several or not all(isinstance(each, str) or _is_ids(each) for each in several):
        fields.refuse("prompt", "must be a string, an array of strings, an array of token ids, or an array of arrays "
                      "of token ids, and not empty", code="invalid_type")
    ids = [np.array([model.tokenizer.bos, *model.tokenizer.encode(each)] if isinstance(each, str) else each, np.int32)
           for each in several]
    shown = [""] * len(ids)
    if fields.take("echo", bool, False):
        shown = [each if isinstance(each, str) else model.tokenizer.decode(each) for each in several]
    return _Prompts(ids, "prompt", frozenset([model.tokenizer.eos]), shown)


def _is_ids(value: Any) -> bool:
    """Whether these are token ids, of whatever vocabulary."""
    return isinstance(value, list) and len(value) > 0 and all(type(each) is int and 0 <= each < 2 ** 31
                                                              for each in value)


def _conversation(fields: Fields, model: ServedModel) -> _Prompts:
    given = fields.need("messages", list)
    if model.template is None:
        raise ApiError(400, f"{model.name} has no chat template: ask /v1/completions", param="messages")
    if not given:
        fields.refuse("messages", "must have at least one", code="invalid_value")
    messages = [_message(each, f"messages[{index}]") for index, each in enumerate(given)]
    try:
        ids = model.template.encode(messages)
    except ConfigError as error:
        raise ApiError(400, str(error), param="messages") from error
    return _Prompts([ids], "messages", frozenset(model.template.stop_ids), [""])


def _message(given: Any, path: str) -> Message:
    fields = Fields(given, path)
    role, content = fields.need("role", str), fields.need_any("content")
    if role not in _ROLES:
        fields.refuse("role", f"({role}) must be one of {', '.join(_ROLES)}", code="invalid_value")
    if isinstance(content, list):
        content = "".join(_part(each, f"{path}.content[{index}]") for index, each in enumerate(content))
    if not isinstance(content, str):
        fields.refuse("content", "must be a string or an array of text parts", code="invalid_type")
    # A client sends answers back as it got them, with fields that say nothing.
    fields.leave_at({name: ([],) for name in ("annotations", "audio", "function_call", "refusal", "tool_calls")})
    fields.take_any("name")
    fields.end()
    return {"role": _ROLES[role], "content": content}


def _part(given: Any, path: str) -> str:
    fields = Fields(given, path)
    kind = fields.need("type", str)
    if kind != "text":
        fields.refuse("type", f"({kind}) is not supported: give text", code="invalid_value")
    return fields.need("text", str)
