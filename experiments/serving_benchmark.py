"""Serve a load of requests and tell what each had to wait.

  python experiments/serving_benchmark.py --rate 2 --requests 40
  python experiments/serving_benchmark.py --model runs/quickstart --variants one speculative apart --simulate-devices 4
  python experiments/serving_benchmark.py --variants one --concurrent 1 32 --out experiments/results/serving_cpu

An open load: requests arrive at random at a mean rate, whether or not earlier ones are answered. Prompts are paragraphs
of real text, with their lengths; an answer is as long as the paragraph that follows. A share of them begins alike, as
with a system prompt. Of a run folder the weights are trained and drafts are accepted as they are in use; otherwise
they are random, for sizes and speed. With --concurrent as many clients each ask again when they are answered: the
throughput that there is, instead of the waiting at a given load.

Variants: "one" engine; "speculative", with drafts of the prediction modules; "apart", prefill and decode on devices of
their own; "spread", experts over four devices; "replicated", the same with replicas, which are placed anew by the load
that was measured in a first part of the requests. With --simulate-devices 4 there are enough on any machine, which
share its cores.
"""

from __future__ import annotations

import collections
import contextlib
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
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.disaggregated import Disaggregated
from dsv3_jax.inference.engine import Engine, Totals
from dsv3_jax.inference.expert_slots import deployment_on, expert_layers
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.request import Request, Ticket
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Busy, Sizes
from dsv3_jax.mesh import make_mesh, shardings
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS
from dsv3_jax.training import runtime
from dsv3_jax.training.corpus import read_corpus
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report
from experiments.decode_speed import SMALL_100M
from experiments.inference_options import FolderOptions, load_for_inference, tokenizer_in

VARIANTS = ("one", "speculative", "apart", "spread", "replicated")
DEVICES = {"apart": 2, "spread": 4, "replicated": 4}
"""Of a variant that has more than one."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The load, and what serves it."""

    model: str = "small_100m"
    """A run folder or published model with its tokenizer; or small_100m or a preset's name, with random weights."""
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
    simulate_devices: int | None = None
    """So many CPU devices, for variants that want more than there are."""
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
        runtime.start(MeshConfig(simulate_devices=arguments.simulate_devices))
        check_devices(arguments.variants)
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


def check_devices(variants: Sequence[str]) -> None:
    """Raises `ConfigError` if there are too few."""
    for variant in variants:
        if DEVICES.get(variant, 1) > jax.device_count():
            raise ConfigError(f"--variants {variant} wants {DEVICES[variant]} devices, and there are "
                              f"{jax.device_count()}: add --simulate-devices {max(DEVICES.values())}")


def open_model(arguments: Arguments) -> tuple[ModelConfig, Precision, Callable[[Any], tuple], Callable[[str], list]]:
    """The architecture, its precision, (mesh) -> (params, router biases), and text -> ids."""
    named_models = {"small_100m": dataclasses.replace(SMALL_100M, num_nextn_predict_layers=1), **MODELS}
    if arguments.model not in named_models:
        options = FolderOptions(Path(arguments.model), precision=arguments.precision)
        loaded, tokenizer = load_for_inference(options), tokenizer_in(options.folder)
        return (loaded.model, loaded.precision, lambda mesh: (loaded.params, loaded.router_bias),
                lambda text: [tokenizer.bos, *tokenizer.encode(text)])
    config = named_models[arguments.model]

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
            if variant == "replicated":
                assert isinstance(engine, Engine)
                learn_load(engine, asked)
            began = time.perf_counter()
            tickets = (open_load(engine, asked, arguments) if clients is None
                       else closed_load(engine, asked, clients))
            for ticket in tickets:
                ticket.wait()
            result = told_of(tickets, engine, time.perf_counter() - began)
            if variant in ("spread", "replicated"):
                assert isinstance(engine, Engine)
                result["fullest_device"] = float(engine.imbalance().mean())
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
    if variant in ("spread", "replicated"):
        return spread_engine(config, precision, load_on, sizes, replicas=variant == "replicated")
    if variant != "apart":
        return on_device(0)
    system = Disaggregated(waiting=sizes.waiting)
    system.add_prefill("prefill", lambda push: on_device(0, hand_over=push))
    system.add_decode("decode", on_device(1, receives=True))
    return system


def spread_engine(config: ModelConfig, precision: Precision, load_on: Callable[[Any], tuple], sizes: Sizes,
                  replicas: bool) -> Engine:
    """On devices that share experts, as many rows altogether as `sizes` says; a replica for every fourth expert, if
    any."""
    devices = DEVICES["spread"]
    mesh = make_mesh(MeshConfig(data=1, scale_up=devices), jax.devices()[:devices])
    redundant = -(-config.n_routed_experts // 4 // devices) * devices if replicas else 0
    placement = Placement.in_order(expert_layers(config), deployment_on(config, mesh, redundant))
    on_mesh = ModelOnMesh(config, mesh, precision=precision, placement=placement)
    params, bias = load_on(mesh)
    params, bias = (jax.device_put(x, shardings(x, mesh)) for x in (params, bias))
    each = -(-sizes.rows // devices)
    return Engine(on_mesh, on_mesh.prepare(params, bias),
                  dataclasses.replace(sizes, rows=each, pages=each * sizes.pages_per_row))


def learn_load(engine: Engine, asked: list[Request]) -> None:
    """Half of the requests, and experts placed by what they asked of them; it counts for nothing else."""
    for ticket in [engine.submit(request) for request in asked[:len(asked) // 2]]:
        ticket.wait()
    moved = engine.rebalance()
    print(f"rebalanced in {moved.seconds:.2f} s: {moved.moved_bytes / 1e6:.1f} MB moved", file=sys.stderr, flush=True)
    engine.totals = Totals(accepted=[0] * len(engine.totals.accepted))


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
    """Each client asks for the next when it is answered."""
    tickets: list[Ticket] = []
    left = collections.deque(asked)

    def client() -> None:
        with contextlib.suppress(IndexError):
            while True:
                ticket = engine.submit(left.popleft())
                tickets.append(ticket)
                ticket.wait()
    threads = [threading.Thread(target=client) for _ in range(clients)]
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
             "| prompt tokens reused | drafts accepted | fullest device |", "|---|---|---|---|---|---|---|---|---|"]
    for row in told["results"]:
        load = f"{row['rate']:g} requests/s" if "rate" in row else f"{row['concurrent']} clients"
        first, each = row["time_to_first_token_s"], row["time_per_token_s"]
        accepted = ", ".join(f"{100 * share:.0f}%" for share in row["acceptance"]) or "-"
        fullest = f"{row['fullest_device']:.2f} of mean" if "fullest_device" in row else "-"
        lines.append(f"| {row['variant']} | {load} | {row['tokens_per_second']:.1f} | {first['median']:.2f} / "
                     f"{first['p99']:.2f} s | {1e3 * each['median']:.0f} / {1e3 * each['p99']:.0f} ms | "
                     f"{row['rows_per_step']:.1f} | {100 * row['reused_share']:.0f}% | {accepted} | {fullest} |")
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
