"""Talk to a model whose folder has a chat template.

  python experiments/chat.py models/moonlight --temperature 0.6 --top-p 0.95
  echo "What is a latent?" | python experiments/chat.py models/moonlight --json

Each line of standard input is a message; the answer streams. An empty line starts a new conversation, the end of input
ends the program.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated, Any

import tyro
from flax import nnx

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.generate import Generation, Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.text import TextStream
from dsv3_jax.interop.chat_template import ChatTemplate, Message
from dsv3_jax.interop.tokenizer import Tokenizer
from experiments.command_line import finish, standard_output_for_json
from experiments.inference_options import DEFAULT_SAMPLING, GeneratorOptions, load_generator, sampling_of_row


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Whom to talk to, and how."""

    folder: Annotated[GeneratorOptions, tyro.conf.arg(name="")]
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = DEFAULT_SAMPLING
    system: str | None = None
    """What the model is told before the conversation."""
    tokens: int = 512
    """Most tokens of an answer."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text at which an answer ends, given once for each; it is not shown."""
    json: bool = False
    """Take all of standard input as one message, and print one JSON object with the answer."""


class Conversation:
    """Messages so far, and how the model answers them. Each answer reads the conversation anew."""

    def __init__(self, arguments: Arguments, tokenizer: Tokenizer, generator: Generator, weights: nnx.State):
        self._arguments, self._tokenizer, self._generator, self._weights = arguments, tokenizer, generator, weights
        self._template = ChatTemplate(arguments.folder.folder, tokenizer)
        self._answers = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the system's message."""
        system = self._arguments.system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str, say: Any) -> tuple[str, Generation]:
        """The answer to a user's message; `say` gets it piece by piece."""
        self.messages.append({"role": "user", "content": text})
        generation = self._generator.generate(
            self._weights, [self._prompt()], self._arguments.tokens,
            sampling_of_row(self._arguments.sampling, self._answers), self._template.stop_ids)
        stream = TextStream(self._tokenizer, self._arguments.stop)
        for [ids] in generation:
            say(stream.push(token for token in ids if token not in self._template.stop_ids))
            if stream.stopped is not None:
                generation.finish(0)
        say(stream.finish())
        self._answers += 1
        self.messages.append({"role": "assistant", "content": stream.text})
        return stream.text, generation

    def _prompt(self) -> Any:
        """The conversation's ids; its oldest exchanges are left out while it does not fit the window."""
        room, first = self._generator.window - self._arguments.tokens, int(self._arguments.system is not None)
        while len(ids := self._template.encode(self.messages)) > room and len(self.messages) > first + 1:
            print("(the conversation outgrew the window: its oldest exchange is forgotten)", file=sys.stderr)
            del self.messages[first:first + 2]
        return ids


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        conversation = Conversation(arguments, *load_generator(arguments.folder)[1:])
        if arguments.json:
            began = time.perf_counter()
            text, generation = conversation.answer(sys.stdin.read().rstrip("\n"), lambda piece: None)
            write_json({"answer": text, "tokens": len(generation.tokens[0]), "acceptance": generation.acceptance,
                        "tokens_per_step": generation.tokens_per_step, "seconds": time.perf_counter() - began})
        else:
            _talk(conversation)


def _talk(conversation: Conversation) -> None:
    def prompt() -> None:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
    prompt()
    for line in sys.stdin:
        if line.strip():
            try:
                conversation.answer(line.rstrip("\n"), lambda piece: print(piece, end="", flush=True))
                print()
            except ConfigError as error:  # of this message: the next may be better
                conversation.messages.pop()
                print(f"error: {error}", file=sys.stderr)
        else:
            conversation.clear()
        prompt()


if __name__ == "__main__":
    finish(main)
