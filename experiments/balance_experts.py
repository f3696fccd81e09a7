"""How evenly replicas of experts load the devices that serve a model, and what following the load costs.

  python experiments/balance_experts.py
  python experiments/balance_experts.py --skew zipf --amount 0.5 --deployment prefill
  python experiments/balance_experts.py --load runs/quickstart/expert_load.jsonl --preset quickstart --devices 8 \
      --nodes 2 --redundant 8 --by-group

The load of the fullest device over the mean, in the mean of layers and in the worst: with experts in their order and no
replicas; placed as the published EPLB does, greedily; as `place` does, which searches from there; and a bound that no
placement can be below. Then loads drift, and replicas move: nothing, a wholly new placement, or the one of fewest bytes
within the tolerance.

Deployments are DeepSeek-V3's: prefill on 4 nodes, by the router's groups, and decode on 40 (paper 2, section 3.4); and
decode on 18, as served later (DeepSeek's open-infra-index of February 2025). Or your own.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dsv3_jax.config import ConfigError, ModelConfig, named
from dsv3_jax.expert_parallel.rebalancing import arranged, rebalanced, transfers
from dsv3_jax.expert_parallel.replicas import Deployment, Placement, checked_loads, lower_bound, place
from dsv3_jax.presets import DEPLOYMENTS, MODELS, ServingDeployment
from experiments.command_line import finish, import_pyplot, provenance, standard_output_for_json, write_report

WEIGHT_BYTES = {"fp8": 1 + 4 / 128 ** 2, "bf16": 2.0}
"""A float8 block of 128 x 128 has a float32 scale."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to place, and where."""

    preset: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(MODELS)}.")] = "deepseek_v3"
    deployment: tuple[str, ...] = ("all",)
    """prefill, decode144, decode320, decode72, or all."""
    devices: int | None = None
    """Of a deployment of your own, in place of those."""
    nodes: int = 1
    """There."""
    redundant: int = 0
    """Slots there beyond the model's experts."""
    by_group: bool = False
    """Place whole groups of the router on nodes there, so that its node limit limits traffic."""
    load: Path | None = None
    """Measured loads: .json with [layers, experts], .csv with a row a layer, or a run's expert_load.jsonl, of which the
    last line is taken. Otherwise loads are drawn."""
    skew: Literal["lognormal", "zipf", "hot"] = "lognormal"
    """Of drawn loads."""
    amount: float = 0.5
    """Deviation of the load's logarithm; Zipf's exponent; or what one expert gets over the others, which are equal."""
    layers: int | None = None
    """Of drawn loads; default the model's."""
    drift: float = 0.2
    """Deviation of the logarithm of what later loads are multiplied by."""
    tolerance: float = 0.02
    """Of the mean load: what better balance must bring for more bytes to move."""
    weights: Literal["fp8", "bf16"] = "fp8"
    """Format of what moves."""
    seed: int = 0
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def deployments_of(arguments: Arguments, model: ModelConfig) -> dict[str, Deployment]:
    """Those asked for.

    Raises:
      ConfigError: a name is unknown, or sizes don't go together.
    """
    if arguments.devices is not None:
        sizes = {"own": ServingDeployment(arguments.devices, arguments.nodes, arguments.redundant, arguments.by_group)}
    else:
        names = DEPLOYMENTS if "all" in arguments.deployment else arguments.deployment
        sizes = {name: named(DEPLOYMENTS, name, "--deployment") for name in names}
    experts = model.n_routed_experts
    return {name: Deployment(experts, experts + size.redundant, size.devices, size.nodes,
                             model.n_group if size.by_group else 1) for name, size in sizes.items()}


def loads_of(arguments: Arguments, model: ModelConfig) -> np.ndarray:
    """float64 [layers, experts], read or drawn."""
    if arguments.load is not None:
        return read_loads(arguments.load)
    if arguments.amount < 0:
        raise ConfigError(f"--amount ({arguments.amount:g}) must be at least 0; 0 is no skew")
    layers = model.num_moe_layers if arguments.layers is None else arguments.layers
    if layers < 1:
        raise ConfigError(f"--layers ({layers}) must be at least 1")
    rng = np.random.default_rng(arguments.seed)
    shape, rank = (layers, model.n_routed_experts), np.arange(1, model.n_routed_experts + 1)
    if arguments.skew == "lognormal":
        return np.exp(arguments.amount * rng.standard_normal(shape))
    load_E = np.where(rank == 1, arguments.amount, 1.0) if arguments.skew == "hot" else rank ** -arguments.amount
    return rng.permuted(np.broadcast_to(load_E, shape), axis=1)


def read_loads(path: Path) -> np.ndarray:
    """float64 [layers, experts] of a file.

    Raises:
      ConfigError: it isn't there, or isn't of that form.
    """
    try:
        text = path.read_text()
        if path.suffix == ".csv":
            loads = [[float(value) for value in row] for row in csv.reader(text.splitlines()) if row]
        elif path.suffix == ".jsonl":
            loads = json.loads(text.splitlines()[-1])["share"]
        else:
            loads = json.loads(text)
        load_LE = np.atleast_2d(np.array(loads, np.float64))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"--load {path}: {error}; give .json with [layers, experts], .csv with a row a layer, or a "
                          "run's expert_load.jsonl") from error
    empty = np.flatnonzero(load_LE.sum(axis=1) == 0)
    if len(empty):
        raise ConfigError(f"--load {path}: layer {empty[0]} has no load; leave it out")
    return load_LE


def study(name: str, deployment: Deployment, load_LE: np.ndarray, arguments: Arguments,
          expert_bytes: float) -> dict[str, Any]:
    """One deployment: balance, and what it costs to keep."""
    load_LE = checked_loads(load_LE, deployment)
    began = time.perf_counter()
    placed = place(load_LE, deployment)
    seconds = time.perf_counter() - began
    later_LE = load_LE * np.exp(arguments.drift * np.random.default_rng(arguments.seed + 1).standard_normal(
        load_LE.shape))
    choices = {"stay": placed, "follow": rebalanced(later_LE, placed, arguments.tolerance),
               "anew": arranged(place(later_LE, deployment), placed)}
    mean_L = load_LE.sum(axis=1) / deployment.devices
    return {
        "deployment": name, **dataclasses.asdict(deployment), "layers": len(load_LE), "place_seconds": seconds,
        "before": over_mean(without_replicas(load_LE, deployment.devices).max(axis=1) / mean_L),
        "greedy": fullest(place(load_LE, deployment, "greedy"), load_LE), "placed": fullest(placed, load_LE),
        "bound": over_mean(lower_bound(load_LE, deployment) / mean_L),
        "later": {choice: {**fullest(placement, later_LE), **moved(placement, placed, expert_bytes)}
                  for choice, placement in choices.items()}}


def without_replicas(load_LE: np.ndarray, devices: int) -> np.ndarray:
    """[L, devices]: experts in their order, as equally many a device as can be."""
    device_E = np.arange(load_LE.shape[1]) * devices // load_LE.shape[1]
    return np.stack([np.bincount(device_E, load_E, devices) for load_E in load_LE])


def fullest(placement: Placement, load_LE: np.ndarray) -> dict[str, float]:
    """The fullest device over the mean."""
    load_LM = placement.device_load(load_LE)
    return over_mean(load_LM.max(axis=1) / load_LM.mean(axis=1))


def over_mean(ratio_L: np.ndarray) -> dict[str, float]:
    """Of layers."""
    return {"mean": float(ratio_L.mean()), "worst": float(ratio_L.max())}


def moved(new: Placement, old: Placement, expert_bytes: float) -> dict[str, float]:
    """What devices are sent."""
    moves = transfers(new, old)
    inside, between = moves.bytes_sent(expert_bytes)
    return {"replicas_moved": len(moves.layer_X), "bytes_inside_nodes": inside, "bytes_between_nodes": between}


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    lines = ["# Replicas of experts", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
             f"Loads of {about['preset']}'s experts: {about['loads']}. The fullest device's load over the mean: in the "
             "mean of layers, and in the worst.", "",
             "| deployment | slots | devices | nodes | groups | layers | no replicas | greedy | placed | bound | "
             "seconds |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in result["deployments"]:
        sizes = [f"{row[name]}" for name in ("deployment", "slots", "devices", "nodes", "groups", "layers")]
        ratios = [f"{row[way]['mean']:.3f}, {row[way]['worst']:.3f}" for way in ("before", "greedy", "placed", "bound")]
        lines.append(f"| {' | '.join([*sizes, *ratios])} | {row['place_seconds']:.2f} |")
    lines += ["", f"Then every load is multiplied by exp({about['drift']:g} z), z normal, and replicas of "
              f"{about['expert_bytes'] / 1e6:.1f} MB move: none; those of fewest bytes within {about['tolerance']:.1%} "
              "of the best balance; those of a new placement, arranged for fewest.", "",
              "| deployment | | fullest over mean | replicas moved a layer | GB inside nodes | GB between |",
              "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {row['deployment']} | {choice} | {told['mean']:.3f}, {told['worst']:.3f} | "
              f"{told['replicas_moved'] / row['layers']:.1f} | {told['bytes_inside_nodes'] / 1e9:.1f} | "
              f"{told['bytes_between_nodes'] / 1e9:.1f} |"
              for row in result["deployments"] for choice, told in row["later"].items()]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> Any:
    """The figure: the fullest device over the mean, by deployment."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    rows, labels = result["deployments"], {"before": "no replicas", "greedy": "greedy", "placed": "placed",
                                           "bound": "bound"}
    for index, (way, label) in enumerate(labels.items()):
        axis.bar(np.arange(len(rows)) + 0.2 * (index - 1.5), [row[way]["mean"] for row in rows], 0.2, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xticks=range(len(rows)), xticklabels=[row["deployment"] for row in rows],
             ylabel="fullest device over the mean, mean of layers", title=result["about"]["loads"])
    axis.legend()
    return figure


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.drift < 0:
        raise ConfigError(f"--drift ({arguments.drift:g}) must be at least 0")
    model = named(MODELS, arguments.preset, "--preset")
    expert_bytes = 3 * model.hidden_size * model.moe_intermediate_size * WEIGHT_BYTES[arguments.weights]
    with standard_output_for_json(arguments.json) as write_json:
        deployments, load_LE = deployments_of(arguments, model), loads_of(arguments, model)
        rows = [study(name, deployment, load_LE, arguments, expert_bytes) for name, deployment in deployments.items()]
        loads = str(arguments.load) if arguments.load else f"{arguments.skew}, {arguments.amount:g}"
        result = {"about": {**provenance(), "preset": arguments.preset, "loads": loads, "drift": arguments.drift,
                            "tolerance": arguments.tolerance, "expert_bytes": expert_bytes}, "deployments": rows}
        write_report(arguments.out, result, as_markdown(result), lambda: draw(result))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
