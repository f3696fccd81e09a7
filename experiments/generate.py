"""Continue prompts with a trained run.

  python experiments/generate.py runs/quickstart --prompt "The state of the Union"
  python experiments/generate.py runs/quickstart --prompt "We must" --prompt "I ask" --top-p 0.9 --speculative
  echo "My fellow citizens" | python experiments/generate.py runs/quickstart --prompt -

Streams the text as it is made; several prompts run as one batch and are printed one after the other. The same seed
gives the same text (with --speculative another one, of the same distribution).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.generate import Generation
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.text import TextStream
from dsv3_jax.interop.tokenizer import Tokenizer
from experiments.command_line import finish, standard_output_for_json
from experiments.inference_options import DEFAULT_SAMPLING, GeneratorOptions, load_generator, sampling_of_row


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to continue, and how."""

    folder: Annotated[GeneratorOptions, tyro.conf.arg(name="")]
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = DEFAULT_SAMPLING
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue, given once for each; - reads one from standard input. Default: "The American people"."""
    prompts: Path | None = None
    """A file with a prompt a line."""
    tokens: int = 128
    """Most new tokens of each."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text at which an answer ends, given once for each; it is not shown."""
    json: bool = False
    """Print one JSON object (prompt, text, speed; with several prompts a list of them under "answers")."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    texts = _prompts(arguments)
    with standard_output_for_json(arguments.json) as write_json:
        loaded, tokenizer, generator, weights = load_generator(arguments.folder)
        ids = [np.array([tokenizer.bos, *tokenizer.encode(text)], np.int32) for text in texts]
        generation = generator.generate(weights, ids, arguments.tokens,
                                        [sampling_of_row(arguments.sampling, row) for row in range(len(texts))],
                                        [tokenizer.eos])
        began = time.perf_counter()
        rows = run(generation, tokenizer, arguments.stop, None if arguments.json else texts)
        seconds = time.perf_counter() - began
        answers = [{"prompt": text, "text": row.text, "tokens": len(made), "stop": row.stopped}
                   for text, row, made in zip(texts, rows, generation.tokens, strict=True)]
        about = {"seconds": seconds, "source": loaded.source, "acceptance": generation.acceptance,
                 "tokens_per_step": generation.tokens_per_step}
        write_json({**answers[0], **about} if len(answers) == 1 else {"answers": answers, **about})
    if not arguments.json:
        made = sum(map(len, generation.tokens))
        kept = "" if generation.acceptance is None else f", {100 * generation.acceptance:.0f}% of drafts accepted"
        print(f"{made} tokens in {seconds:.1f} s{kept}, {loaded.source}", file=sys.stderr)


def run(generation: Generation, tokenizer: Tokenizer, stop: tuple[str, ...],
        shown: list[str] | None) -> list[TextStream]:
    """Generates to the end; with `shown`, streams the first row's text and prints the others, each after its prompt."""
    rows = [TextStream(tokenizer, stop) for _ in generation.tokens]

    def say(text: str) -> None:
        if shown is not None:
            print(text, end="", flush=True)
    say(shown[0] if shown else "")
    for new in generation:
        for row, ids in enumerate(new):
            # The end token ends the row and has no text.
            text = rows[row].push(token for token in ids if token != tokenizer.eos)
            if row == 0:
                say(text)
            if rows[row].stopped is not None:
                generation.finish(row)
    rest = [row.finish() for row in rows]
    say(rest[0] + "\n")
    for row in range(1, len(rows)):
        say(f"\n{shown[row] if shown else ''}{rows[row].text}\n")
    return rows


def _prompts(arguments: Arguments) -> list[str]:
    texts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in arguments.prompt]
    if arguments.prompts is not None:
        if not arguments.prompts.is_file():
            raise ConfigError(f"--prompts ({arguments.prompts}) is not a file; give one with a prompt a line")
        texts += [line for line in arguments.prompts.read_text().splitlines() if line]
        if not texts:
            raise ConfigError(f"--prompts ({arguments.prompts}) has no lines")
    return texts or ["The American people"]


if __name__ == "__main__":
    finish(main)
