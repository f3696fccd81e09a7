"""What the router's node limit saves on both networks, and what it costs in quality (paper 1, section 4.3).

  python experiments/node_limited_routing.py
  python experiments/node_limited_routing.py --run runs/quickstart --out experiments/results/node_limited_routing

Tokens of DeepSeek-V3's router (256 experts in 8 groups, 8 a token) on 8 nodes of 8 devices, with random affinities, for
every limit of 1 to 8 nodes: rows that a token sends over the slow network if each choice travels alone, and if a node
gets one copy of it; copies inside nodes; bytes of both at width 7168, E4M3 there and bf16 back. Paper 1 counts t for a
token's row: 8t without limit and copies shared, M t with both. With --run, trained routers read held-out text under
each limit, on as many (simulated) nodes as the model has groups.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dsv3_jax.codesign.traffic import random_choices, rows_a_token
from dsv3_jax.config import ConfigError, MeshConfig, RunConfig, run_from_dict
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.expert_parallel.plan import Traffic
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import batch_sharding
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import model_structure
from dsv3_jax.nn.moe import RouterStats
from dsv3_jax.presets import MODELS
from dsv3_jax.training.batches import validation_windows
from dsv3_jax.training.loss import negative_log_likelihood
from dsv3_jax.training.tokens import prepare
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report
from experiments.inference_options import FolderOptions, Loaded, load_for_inference

V3 = MODELS["deepseek_v3"]
TOPOLOGY = Topology(V3.n_routed_experts, scale_out=8, scale_up=8)
ROWS = 32
"""Windows of held-out text read at once."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to route."""

    run: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A run folder of experiments/train.py, given once for each."""
    tokens: int = 65_536
    """Of the random router."""
    seed: int = 0
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def random_router(tokens: int, seed: int) -> list[dict[str, float]]:
    """V3's router with affinities drawn independently, under each limit."""
    bytes_ = row_bytes(V3.hidden_size, 2, Wire(dispatch="float8"))
    rows = []
    for limit in range(1, V3.n_group + 1):
        experts_TK = random_choices(dataclasses.replace(V3, topk_group=limit), tokens, seed)
        counted = rows_a_token(experts_TK, TOPOLOGY)
        there_and_back = bytes_.dispatch + bytes_.combine
        rows.append({"limit": limit, **counted._asdict(), "slow_bytes": counted.slow_rows * there_and_back,
                     "fast_bytes": counted.fast_rows * there_and_back,
                     "load_max_over_mean": load_max_over_mean(np.bincount(experts_TK.ravel(),
                                                                          minlength=V3.n_routed_experts))})
    return rows


def load_max_over_mean(load_E: np.ndarray) -> float:
    """The busiest expert's tokens over the mean."""
    return float(load_E.max() / load_E.mean())


def trained_router(folder: Path) -> list[dict[str, Any]]:
    """A run's held-out text under each limit; the weights are as trained, under the run's own limit."""
    config = run_from_dict(json.loads((folder / "config.json").read_text()))
    groups = config.model.n_group
    if groups == 1:
        raise ConfigError(f"--run {folder}: its router has one group (model.n_group), so there are no nodes to limit; "
                          "take a run with two groups or more")
    mesh = MeshConfig(data=1, scale_out=groups, simulate_devices=groups)
    loaded = load_for_inference(FolderOptions(folder, mesh=mesh))
    split = prepare(config.data, config.model.vocab_size, config.seed).validation
    inputs, weights = validation_windows(split.tokens, config.batch.sequence_length, 1)
    rows = []
    for limit in range(1, groups + 1):
        limited = dataclasses.replace(config, model=dataclasses.replace(config.model, topk_group=limit))
        nll, stats = read(limited, loaded, inputs, weights)
        sent: Traffic = stats.traffic
        rows.append({"run": folder.name, "limit": limit, "trained_with": config.model.topk_group,
                     "bits_per_byte": nll / math.log(2) / split.text_bytes if split.text_bytes else None,
                     "loss": nll / float(weights.sum()), "nodes": float(sent.nodes / sent.tokens),
                     "slow_rows": float(sent.scale_out_rows / sent.tokens),
                     "experts_used": float(np.mean(stats.load_E > 0)),
                     "load_max_over_mean": float(np.mean(stats.load_E.max(axis=-1) / stats.load_E.mean(axis=-1)))})
    return rows


def read(config: RunConfig, loaded: Loaded, inputs: np.ndarray, weights: np.ndarray) -> tuple[float, RouterStats]:
    """Summed loss in nats, and summed statistics of the main model's MoE layers."""
    structure = model_structure(config.model, loaded.precision)

    @jax.jit
    def run(params: nnx.State, router_bias: nnx.State, tokens: jax.Array,
            weights: jax.Array) -> tuple[jax.Array, RouterStats]:
        model = nnx.merge(structure, params, router_bias)
        out = model(tokens[:, :-1], mtp=False, execution=config.execution)
        nll = negative_log_likelihood(gathered(model.lm_head), out.hidden_BTD, tokens[:, 1:])
        return jnp.sum(nll * weights), out.stats
    total: Any = None
    with jax.set_mesh(loaded.mesh):
        for start in range(0, len(inputs), ROWS):
            missing = max(0, start + ROWS - len(inputs))
            batch = [jax.device_put(np.pad(x[start:start + ROWS], ((0, missing), (0, 0))), batch_sharding(loaded.mesh))
                     for x in (inputs, weights)]
            told = jax.tree.map(np.asarray, run(loaded.params, loaded.router_bias, *batch))
            total = told if total is None else jax.tree.map(np.add, total, told)
    nll, stats = total
    return float(nll), stats._replace(traffic=jax.tree.map(np.sum, stats.traffic))


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    lines = ["# What the node limit saves and costs", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
             f"DeepSeek-V3's router with random affinities, {about['tokens']:,} tokens, 8 nodes of 8 devices. Of a "
             "token: rows over the slow network, each choice alone or one copy to a node; copies inside nodes; and KB "
             "(1000 bytes) of a row's way there in E4M3 and back in bf16.", "",
             "| limit M | nodes | slow, each alone | slow, one a node | fast | slow KB | fast KB | load max/mean |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['limit']} | {row['nodes']:.2f} | {row['slow_copies']:.2f} | {row['slow_rows']:.2f} | "
              f"{row['fast_rows']:.2f} | {row['slow_bytes'] / 1e3:.1f} | {row['fast_bytes'] / 1e3:.1f} | "
              f"{row['load_max_over_mean']:.2f} |" for row in result["random"]]
    lines += ["", "A token's own node is among its nodes, and not on the network: one in eight."]
    if result["trained"]:
        lines += ["", "Trained routers, read under each limit with the weights of the run's own:", "",
                  "| run | trained with M | read with | bits per byte | nodes | slow, one a node | experts used | "
                  "load max/mean |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
        lines += [f"| {row['run']} | {row['trained_with']} | {row['limit']} | {row['bits_per_byte'] or math.nan:.4f} | "
                  f"{row['nodes']:.2f} | {row['slow_rows']:.2f} | {row['experts_used']:.0%} | "
                  f"{row['load_max_over_mean']:.2f} |" for row in result["trained"]]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> Any:
    """The figure: rows against the limit, and bits per byte of trained runs."""
    pyplot = import_pyplot()
    runs = list(dict.fromkeys(row["run"] for row in result["trained"]))
    figure, axes = pyplot.subplots(1, 1 + bool(runs), figsize=(6 + 5 * bool(runs), 4.5), squeeze=False,
                                   layout="constrained")
    left, *right = axes[0]
    limits = [row["limit"] for row in result["random"]]
    for name, label in {"slow_copies": "slow network, each choice alone", "slow_rows": "slow network, one copy a node",
                        "fast_rows": "fast network"}.items():
        left.plot(limits, [row[name] for row in result["random"]], "o-", label=label)
    left.set(xlabel="node limit M", ylabel="rows sent for a token", title="DeepSeek-V3's router, random affinities",
             ylim=(0, None))
    left.legend(fontsize=8)
    for run in runs:
        rows = [row for row in result["trained"] if row["run"] == run]
        right[0].plot([row["limit"] for row in rows], [row["bits_per_byte"] for row in rows], "o-",
                      label=f"{run}, trained with {rows[0]['trained_with']}")
    if runs:
        right[0].set(xlabel="node limit M", ylabel="bits per byte", title="held-out text, trained routers")
        right[0].legend(fontsize=8)
    return figure


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        # Runs first: they set JAX up.
        trained = [row for folder in arguments.run for row in trained_router(folder)]
        result = {"about": {**provenance(), "tokens": arguments.tokens},
                  "random": random_router(arguments.tokens, arguments.seed), "trained": trained}
        write_report(arguments.out, result, as_markdown(result), lambda: draw(result))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
