"""Serve a load of requests and tell what each had to wait.

  python experiments/serving_benchmark.py --rate 2 --requests 40
  python experiments/serving_benchmark.py --model runs/quickstart --variants one speculative apart
  python experiments/serving_benchmark.py --variants one --concurrent 1 32 --out experiments/results/serving_cpu

An open load: requests arrive at random at a mean rate, whether or not earlier ones are answered. Prompts are paragraphs
of real text, with their lengths; an answer is as long as the paragraph that follows. A share of them begins alike, as
with a system prompt. Of a run folder the weights are trained and drafts are accepted as they are in use; otherwise
they are random, for sizes and speed. With --concurrent as many clients each ask again when they are answered: the
throughput that there is, instead of the waiting at a given load.

Variants: "one" engine; "speculative", with drafts of the prediction modules; "apart", prefill and decode on devices of
their own (simulated on CPU, where they share its cores).
"""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from dsv3_jax.config import ConfigError, DataConfig, MeshConfig, ModelConfig, Precision
from dsv3_jax.inference.disaggregated import Disaggregated
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.request import Request, Ticket
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Busy, Sizes
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.training import runtime
from dsv3_jax.training.corpus import read_corpus
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report
from experiments.decode_speed import SMALL_100M
from experiments.inference_options import FolderOptions, load_for_inference, tokenizer_in

VARIANTS = ("one", "speculative", "apart")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The load, and what serves it."""

    model: str = "small_100m"
    """A run folder or published model with its tokenizer, or small_100m with random weights."""
    precision: Precision | None = None
    """Default: that of the run; float32 for random weights."""
    variants: tuple[str, ...] = ("one",)
    rate: float = 1.0
    """Requests a second, in the mean."""
    requests: int = 32
    """Of each measurement."""
    concurrent: tuple[int, ...] = ()
    """Instead of --rate: so many clients at a time, one measurement each."""
    text: Path | None = None
    """Where prompts come from; default the addresses of the quickstart."""
    longest: int = 256
    """Tokens that a prompt is cut to, and an answer."""
    common: int = 32
    """Tokens of the beginning that a share of the prompts has in common."""
    share: float = 0.5
    """Which share."""
    temperature: float = 0.0
    rows: int = 32
    """Requests that decode at a time."""
    page_size: int = 32
    seed: int = 0
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print the JSON."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = [variant for variant in arguments.variants if variant not in VARIANTS]
    if unknown:
        raise ConfigError(f"--variants ({unknown[0]}) must be among {', '.join(VARIANTS)}")
    if arguments.requests < 1 or arguments.rate <= 0 or any(count < 1 for count in arguments.concurrent):
        raise ConfigError("--requests, --rate and --concurrent must be above 0")
    with standard_output_for_json(arguments.json) as write_json:
        runtime.start(MeshConfig(simulate_devices=2 if "apart" in arguments.variants else None))
        config, precision, load_on, encode = open_model(arguments)
        asked = make_requests(arguments, config, encode)
        results = [{"variant": variant, **result}
                   for variant in arguments.variants
                   for result in measure(arguments, variant, config, precision, load_on, asked)]
        told = {**provenance(), "model": arguments.model, "precision": precision,
                "prompt_tokens": spread([len(request.prompt) for request in asked]),
                "answer_tokens": spread([request.max_new_tokens for request in asked]), "results": results}
        text = as_markdown(told)
        print(text)
        write_report(arguments.out, told, text, lambda: plot(results))
        write_json(told)


def open_model(arguments: Arguments) -> tuple[ModelConfig, Precision, Callable[[Any], tuple], Callable[[str], list]]:
    """The architecture, its precision, (mesh) -> (params, router biases), and text -> ids."""
    if arguments.model != "small_100m":
        options = FolderOptions(Path(arguments.model), precision=arguments.precision)
        loaded, tokenizer = load_for_inference(options), tokenizer_in(options.folder)
        return (loaded.model, loaded.precision, lambda mesh: (loaded.params, loaded.router_bias),
                lambda text: [tokenizer.bos, *tokenizer.encode(text)])
    config = dataclasses.replace(SMALL_100M, num_nextn_predict_layers=1)

    def random(mesh: Any) -> tuple:
        with jax.set_mesh(mesh):
            return jax.jit(lambda: split_model(config, arguments.seed)[1:])()
    return (config, arguments.precision or "float32", random,
            lambda text: [zlib.crc32(word.encode()) % config.vocab_size for word in re.findall(r"\w+|[^\w\s]", text)])


def make_requests(arguments: Arguments, config: ModelConfig, encode: Callable[[str], list]) -> list[Request]:
    """Paragraphs of the text from places drawn at random."""
    data = DataConfig(path=None if arguments.text is None else str(arguments.text))
    paragraphs: list[str] = []
    for document, _ in read_corpus(data).documents():
        paragraphs += [part for part in re.split(r"\n\s*\n", document.text) if len(part.split()) > 3]
        if len(paragraphs) > 20_000:
            break
    if len(paragraphs) < 3:
        raise ConfigError(f"--text ({arguments.text}) has {len(paragraphs)} paragraphs: give a longer text")
    rng = np.random.default_rng(arguments.seed)
    beginning, asked = encode(" ".join(paragraphs[:8]))[:arguments.common], []
    most = min(arguments.longest, config.max_position_embeddings // 2 - arguments.common - 2)
    for number in range(arguments.requests):
        at = int(rng.integers(1, len(paragraphs) - 1))
        prompt, answer = encode(paragraphs[at])[:most], len(encode(paragraphs[at + 1])[:most])
        if rng.random() < arguments.share:
            prompt = [*beginning, *prompt]
        asked.append(Request(np.array(prompt, np.int32), max(2, answer),
                             Sampling(temperature=arguments.temperature, seed=number), user=str(number % 8)))
    return asked


def measure(arguments: Arguments, variant: str, config: ModelConfig, precision: Precision,
            load_on: Callable[[Any], tuple], asked: list[Request]) -> Iterator[dict[str, Any]]:
    """One result of an open load, or one for each number of clients."""
    for clients in arguments.concurrent or (None,):
        engine = make_engine(arguments, variant, config, precision, load_on, asked)
        with engine:
            began = time.perf_counter()
            tickets = (open_load(engine, asked, arguments) if clients is None
                       else closed_load(engine, asked, clients))
            for ticket in tickets:
                ticket.wait()
            result = told_of(tickets, engine, time.perf_counter() - began)
        at = {"rate": arguments.rate} if clients is None else {"concurrent": clients}
        print(f"variant {variant} " + " ".join(f"{key} {value:g}" for key, value in {**at, **result}.items()
                                               if isinstance(value, int | float)), file=sys.stderr, flush=True)
        yield {**at, **result}


def make_engine(arguments: Arguments, variant: str, config: ModelConfig, precision: Precision,
                load_on: Callable[[Any], tuple], asked: list[Request]) -> Engine | Disaggregated:
    """What serves."""
    ahead = config.num_nextn_predict_layers
    longest = max(len(request.prompt) + request.max_new_tokens for request in asked) + ahead
    context = min(config.max_position_embeddings, -(-longest // arguments.page_size) * arguments.page_size)
    sizes = Sizes(arguments.rows, arguments.rows * -(-context // arguments.page_size), arguments.page_size, context,
                  waiting=max(1024, len(asked)))

    def on_device(number: int, **options: Any) -> Engine:
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[number:number + 1])
        on_mesh = ModelOnMesh(config, mesh, precision=precision, speculative=variant == "speculative")
        params, bias = jax.device_put(load_on(mesh), jax.sharding.NamedSharding(mesh, jax.P()))
        return Engine(on_mesh, on_mesh.prepare(params, bias), sizes, **options)
    if variant != "apart":
        return on_device(0)
    system = Disaggregated(waiting=sizes.waiting)
    system.add_prefill("prefill", lambda push: on_device(0, hand_over=push))
    system.add_decode("decode", on_device(1, receives=True))
    return system


def open_load(engine: Engine | Disaggregated, asked: list[Request], arguments: Arguments) -> list[Ticket]:
    """Requests at random times, the gaps between them exponential."""
    gaps_s = np.random.default_rng(arguments.seed).exponential(1 / arguments.rate, len(asked))
    tickets, at_s = [], time.perf_counter()
    for number, (request, gap_s) in enumerate(zip(asked, gaps_s, strict=True)):
        at_s += gap_s
        time.sleep(max(0, at_s - time.perf_counter()))
        try:
            tickets.append(engine.submit(request))
        except Busy as error:
            print(f"refused request {number}: {error}", file=sys.stderr)
        if (number + 1) % max(1, len(asked) // 10) == 0:
            print(f"sent {number + 1} of {len(asked)}, running {engine.running}, waiting {engine.waiting}",
                  file=sys.stderr, flush=True)
    return tickets


def closed_load(engine: Engine | Disaggregated, asked: list[Request], clients: int) -> list[Ticket]:
    """Each client's requests one after the other."""
    tickets: list[Ticket] = []

    def client(own: Sequence[Request]) -> None:
        for request in own:
            ticket = engine.submit(request)
            tickets.append(ticket)
            ticket.wait()
    threads = [threading.Thread(target=client, args=(asked[number::clients],)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tickets


def told_of(tickets: list[Ticket], engine: Engine | Disaggregated, seconds: float) -> dict[str, Any]:
    """What the requests saw, in seconds, and what the engine counted."""
    firsts, each, totals = [], [], engine.totals
    for ticket in tickets:
        assert ticket.first_token_s is not None
        assert ticket.ended_s is not None
        firsts.append(ticket.first_token_s - ticket.arrived_s)
        if len(ticket.tokens) > 1:
            each.append((ticket.ended_s - ticket.first_token_s) / (len(ticket.tokens) - 1))
    made = sum(len(ticket.tokens) for ticket in tickets)
    return {"requests": len(tickets), "refused": totals.refused, "seconds": seconds,
            "tokens_per_second": made / seconds, "time_to_first_token_s": spread(firsts),
            "time_per_token_s": spread(each), "rows_per_step": totals.row_steps / max(1, totals.steps),
            "reused_share": totals.reused_tokens / max(1, totals.prompt_tokens), "preemptions": totals.preemptions,
            "acceptance": totals.acceptance()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th of a hundred."""
    return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99))} if values else {}


def as_markdown(told: dict[str, Any]) -> str:
    """A table, a line a measurement."""
    lines = [f"# Serving {told['model']} ({told['precision']})", "",
             f"`{told['command']}`", "", f"{told['device']}; jax {told['jax']}; {told['date']}. Prompts of "
             f"{told['prompt_tokens']['median']:.0f} tokens in the median, answers of "
             f"{told['answer_tokens']['median']:.0f}.", "",
             "| variant | load | tokens/s | first token, median / p99 | each further, median / p99 | rows a step "
             "| prompt tokens reused | drafts accepted |", "|---|---|---|---|---|---|---|---|"]
    for row in told["results"]:
        load = f"{row['rate']:g} requests/s" if "rate" in row else f"{row['concurrent']} clients"
        first, each = row["time_to_first_token_s"], row["time_per_token_s"]
        accepted = ", ".join(f"{100 * share:.0f}%" for share in row["acceptance"]) or "-"
        lines.append(f"| {row['variant']} | {load} | {row['tokens_per_second']:.1f} | {first['median']:.2f} / "
                     f"{first['p99']:.2f} s | {1e3 * each['median']:.0f} / {1e3 * each['p99']:.0f} ms | "
                     f"{row['rows_per_step']:.1f} | {100 * row['reused_share']:.0f}% | {accepted} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]]) -> Any:
    """Throughput, and waiting as bars from median to p99."""
    pyplot = import_pyplot()
    names = [f"{row['variant']}\n" + (f"{row['rate']:g}/s" if "rate" in row else f"{row['concurrent']} clients")
             for row in results]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    axes[0].bar(names, [row["tokens_per_second"] for row in results], color="tab:blue")
    axes[0].set_title("tokens a second")
    for axis, key, title in ((axes[1], "time_to_first_token_s", "seconds to the first token"),
                             (axes[2], "time_per_token_s", "seconds for each further token")):
        axis.bar(names, [row[key]["p99"] for row in results], color="tab:orange", label="99 of 100 within")
        axis.bar(names, [row[key]["median"] for row in results], color="tab:blue", label="median")
        axis.set_title(title)
        axis.legend()
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    finish(main)
