"""Answers in the OpenAI API's form: one object, or a stream of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from dsv3_jax.inference.server.answer import Answer, Choice, Usage

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


class Form:
    """The objects of one answer.

    Args:
      chat: whether it answers a conversation.
      include_usage: whether a stream's last object counts tokens.

    Attributes:
      id: by which the answer is known.
    """

    def __init__(self, chat: bool, model: str, include_usage: bool):
        self._chat, self._include_usage = chat, include_usage
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._about: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer at once."""
        choices = [self._choice(choice, {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                                if self._chat else {"text": choice.text}) for choice in answer.choices]
        return {**self._about, "object": "chat.completion" if self._chat else "text_completion", "choices": choices,
                "usage": usage_json(answer.usage)}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream says of a choice before there is text."""
        return self._part([self._choice(choice, {"delta": {"role": "assistant", "content": ""}})]) \
            if self._chat else None

    def piece(self, choice: Choice, text: str) -> dict[str, Any]:
        """Text of a choice that is new, and the end if it is the last."""
        return self._part([self._choice(choice, {"delta": {"content": text} if text else {}} if self._chat
                                        else {"text": text})])

    def closing(self, answer: Answer) -> dict[str, Any] | None:
        """What a stream says when all choices have ended."""
        return self._part([]) | {"usage": usage_json(answer.usage)} if self._include_usage else None

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        part = {**self._about, "object": "chat.completion.chunk" if self._chat else "text_completion",
                "choices": choices}
        return part | {"usage": None} if self._include_usage else part

    def _choice(self, choice: Choice, content: dict[str, Any]) -> dict[str, Any]:
        finish = None if choice.finish is None else str(choice.finish)
        return {"index": choice.index, **content, "logprobs": None, "finish_reason": finish}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Counts of tokens."""
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.new, "total_tokens": usage.prompt + usage.new,
            "prompt_tokens_details": {"cached_tokens": usage.reused}}


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
