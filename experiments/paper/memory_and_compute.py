"""Memory and compute of a token, bytes between nodes, and all three of a compiled step (paper 1, tables 1 and 2, and
section 4.3).

  python experiments/paper/memory_and_compute.py
  python experiments/paper/memory_and_compute.py --preset kimi_k2 --pod gb200:8x72 --recompute full --micro-batches 30
  python experiments/paper/memory_and_compute.py --preset deepseek_v3_h800 --hardware mine.toml --pod mine:256x8

Every number is calculated from the configuration; beside those of the layouts in experiments/results/pods stand what
the real compilers made of them. --preset and --pod take others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.codesign.counting import training_flops_per_token
from dsv3_jax.codesign.dense_models import DENSE_MODELS
from dsv3_jax.codesign.hardware_file import load_hardware
from dsv3_jax.codesign.memory import TrainingMemory, serving_memory, training_memory
from dsv3_jax.codesign.pods import Pod, default_mesh, parse_pod
from dsv3_jax.codesign.step_flops import flops_by_cause, padding_flops
from dsv3_jax.codesign.step_traffic import StepTraffic, exchange_traffic
from dsv3_jax.codesign.traffic import random_choices, rows_of_tokens
from dsv3_jax.config import ConfigError, Precision, Recompute, RunConfig, named
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.inference.cache import bytes_per_token
from dsv3_jax.presets import LAYOUTS, MODELS, RUNS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

PODS = Path(__file__).parents[1] / "results" / "pods"
V3 = MODELS["deepseek_v3"]
TOKENS = 65_536
"""Of the random router."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """A further training layout, calculated beside the paper's numbers; without --preset and --pod there is none."""

    preset: str | None = None
    """Model, recipe and layout."""
    pod: str | None = None
    """Hardware and shape, such as h800:256x8; default the preset's own."""
    hardware: Path | None = None
    """A TOML file of your own hardware, whose name --pod may then use."""
    context: int | None = None
    """Tokens of a sequence."""
    micro_batches: int | None = None
    precision: Precision | None = None
    recompute: Recompute | None = None


def section(options: Options = Options()) -> Section:
    """Both tables, section 4.3, and the layouts."""
    text = ("KB are 1000 bytes of cache in bf16; GFLOP are those of a training step for one token at 4096 tokens, "
            "forward and backward, attention's lower triangle only, without multi-token prediction. Copies of a token "
            f"between 8 nodes are counted over {TOKENS:,} tokens of V3's router with random affinities.\n\n"
            "The layouts are whole training steps, calculated from their configuration alone; the notes have what the "
            "pods' compilers report of the same steps (experiments/results/pods). State is weights, optimizer, compute "
            "weights and summed gradients. Of activations only what the backward keeps is calculated.")
    layouts = [(name, *case) for name, case in compiled_layouts().items()]
    own = own_layout(options)
    items = [*_table_1(), *_table_2(), *_section_4_3(), *_served()]
    for name, predicted, report in layouts:
        items += _layout_items(name, predicted, report)
    if own is not None:
        items += _layout_items(*own, {})
        layouts.append((*own, {}))
    return Section("Memory, compute and traffic (paper 1, tables 1 and 2, section 4.3)", text, tuple(items),
                   (("memory_and_compute", lambda: draw(layouts)),))


def _table_1() -> list[Item]:
    """Cache of one token, bf16."""
    v3 = bytes_per_token(V3, mtp=False)
    others = {key: DENSE_MODELS[key] for key in ("qwen2.5_72b", "llama3.1_405b")}
    qwen, llama = (model.cache_bytes_per_token() for model in others.values())
    return [Item("table 1, DeepSeek-V3 (MLA), KB a token", 70.272, v3 / 1e3, "(512 + 64) x 2 B x 61 layers"),
            Item("table 1, Qwen-2.5 72B (GQA), KB a token", 327.680, qwen / 1e3, "2 x 8 x 128 x 2 B x 80 layers"),
            Item("table 1, LLaMA-3.1 405B (GQA), KB a token", 516.096, llama / 1e3, "2 x 8 x 128 x 2 B x 126 layers"),
            Item("table 1, Qwen-2.5 72B over DeepSeek-V3", 4.66, qwen / v3),
            Item("table 1, LLaMA-3.1 405B over DeepSeek-V3", 7.28, llama / v3,
                 "a slip in the paper: its own 516.096 / 70.272 is 7.34")]


def _table_2() -> list[Item]:
    """Training FLOPs of one token."""
    def dense(key: str, causal: bool = True) -> float:
        return DENSE_MODELS[key].training_flops_per_token(4096, causal) / 1e9

    def projections(key: str) -> float:  # to keys and values
        model = DENSE_MODELS[key]
        return 6 * model.layers * 2 * model.hidden * model.kv_heads * model.head_dim / 1e9
    llama, llama_projections = dense("llama3.1_405b"), projections("llama3.1_405b")
    return [
        Item("table 2, DeepSeek-V2, GFLOP a token", 155,
             training_flops_per_token(MODELS["deepseek_v2"], 4096, mtp=False) / 1e9),
        Item("table 2, DeepSeek-V3, GFLOP a token", 250, training_flops_per_token(V3, 4096, mtp=False) / 1e9,
             "the rates of table 4 give 249.7; with multi-token prediction "
             f"{training_flops_per_token(V3, 4096) / 1e9:.1f}"),
        Item("table 2, Qwen-72B, GFLOP a token", 394, dense("qwen2.5_72b"),
             f"Qwen-2.5's sizes; those of Qwen 72B give {dense('qwen_72b'):.1f}, and "
             f"{dense('qwen_72b', causal=False) - projections('qwen_72b'):.1f} without projections to keys and values, "
             "all of attention's square counted: presumably the printed number, although the other lines have the "
             "lower triangle"),
        Item("table 2, LLaMA-405B, GFLOP a token", 2448, llama,
             f"without projections to keys and values ({llama_projections:.1f}), as Qwen's line seems to be, it is "
             f"{llama - llama_projections:.1f}; but so it is with them and half of attention's core, which is as much")]


def _section_4_3() -> list[Item]:
    """Copies of one token on InfiniBand: 8 t, and M t."""
    wire = row_bytes(V3.hidden_size, 2, Wire(dispatch="float8"))
    there_and_back = (wire.dispatch + wire.combine) / 1e3
    _, alone, shared, _ = copies(V3.topk_group)
    _, _, unlimited, _ = copies(V3.n_group)
    return [
        Item("section 4.3, copies of a token over InfiniBand, one an expert, at most", 8, float(alone.max()),
             f"mean {alone.mean():.3f}, for one in eight is at home"),
        Item("section 4.3, the same, one a node, 4 nodes at most (M < 8)", 4, float(shared.max()),
             f"mean {shared.mean():.3f}, {shared.mean() / alone.mean():.3f} of the copies of one an expert"),
        Item("section 4.3, the same without the limit, mean", None, float(unlimited.mean()),
             f"at most {unlimited.max()}"),
        Item("section 4.3, a token's bytes over InfiniBand there and back in one layer, one copy an expert, KB", None,
             float(alone.mean()) * there_and_back, "E4M3 with scales there, bf16 back"),
        Item("section 4.3, the same, one a node, 4 nodes at most, KB", None, float(shared.mean()) * there_and_back)]


@functools.cache
def copies(limit: int) -> tuple[Any, ...]:
    """`traffic.rows_of_tokens` of V3's router with that node limit, on 8 nodes of 8 devices."""
    topology = Topology(V3.n_routed_experts, scale_out=8, scale_up=8)
    return rows_of_tokens(random_choices(dataclasses.replace(V3, topk_group=limit), TOKENS, seed=0), topology)


def _served() -> list[Item]:
    """What a device of paper 2's deployment holds (section 3.4)."""
    items = []
    for name, devices in (("prefill, 32 devices", 32), ("decode, 320 devices", 320)):
        held = serving_memory(V3, devices, rows=64, tokens=4096)
        items.append(Item(f"DeepSeek-V3 served in float8, {name}, GB of one device", None, held.total / 1e9,
                          f"experts {held.experts / 1e9:.1f}, other weights {held.other_weights / 1e9:.1f}, cache of "
                          f"64 sequences of 4096 {held.cache / 1e9:.1f}; paper 2 splits attention over 4 devices, not "
                          "counted; redundant experts neither"))
    return items


class Predicted(NamedTuple):
    """What is calculated of one layout."""

    pod: Pod
    memory: TrainingMemory
    traffic: StepTraffic
    flops: dict[str, float]
    padding: float
    """FLOPs of a token."""


def predict(config: RunConfig, pod: Pod) -> Predicted:
    """Memory, traffic and FLOPs of `config` on `pod`."""
    return Predicted(pod, training_memory(config, pod.devices), exchange_traffic(config, pod.devices),
                     flops_by_cause(config), padding_flops(config, pod.devices))


def compiled_layouts() -> dict[str, tuple[Predicted, dict[str, Any]]]:
    """The layouts that were compiled: what is calculated, and the compiled program's report."""
    layouts = {}
    for path in sorted(PODS.glob("*.json")):
        report = json.loads(path.read_text())
        config = dataclasses.replace(RUNS[report["preset"]], precision=report["precision"])
        if config.mesh.pipe > 1:  # not calculated
            continue
        layouts[path.stem] = predict(config, parse_pod(report["pod"])), report
    return layouts


def own_layout(options: Options) -> tuple[str, Predicted] | None:
    """The layout that was asked for."""
    if options.preset is None:
        if options != Options(out=options.out, json=options.json):
            raise ConfigError("--preset is missing: name what to lay out, such as deepseek_v3_h800")
        return None
    config = named(RUNS, options.preset, "--preset")
    if options.pod is None and options.preset not in LAYOUTS:
        raise ConfigError(f"--preset {options.preset} has no pod of its own: name one, such as --pod h800:256x8")
    own = None if options.hardware is None else load_hardware(options.hardware)
    pod = parse_pod(options.pod or LAYOUTS[options.preset].pod, own)
    batch = dataclasses.replace(config.batch, **_given(sequence_length=options.context,
                                                       micro_batches=options.micro_batches))
    config = dataclasses.replace(config, batch=batch, mesh=default_mesh(config.model, pod, config.mesh),
                                 **_given(precision=options.precision, recompute=options.recompute))
    return f"{options.preset} on {pod}", predict(config, pod)


def _given(**fields: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _layout_items(name: str, predicted: Predicted, report: dict[str, Any]) -> list[Item]:
    """One layout, each number with the compiled program's in its note."""
    memory, compiled = predicted.memory, report.get("memory_by_kind", {})
    sent = {total["axis"]: total["bytes"] for total in report.get("collectives", ()) if total["kind"] == "all-to-all"}
    between = sent.pop("scale_out", None)
    rows = [("state, GB a device", memory.total - memory.kept_activations,
             sum(size for kind, size in compiled.items() if kind != "activations_and_buffers"), 1e9, ""),
            ("activations kept for the backward, GB a device", memory.kept_activations,
             compiled.get("activations_and_buffers"), 1e9,
             "with all buffers, which are not calculated"),
            ("all-to-all between nodes, GB a device and step", predicted.traffic.between_nodes, between, 1e9, ""),
            ("all-to-all inside nodes, GB a device and step", predicted.traffic.inside_node, sum(sent.values()), 1e9,
             ""),
            ("GFLOP a token", sum(predicted.flops.values()), report.get("flops_per_token"), 1e9, ""),
            ("GFLOP a token on the room in experts' buffers", predicted.padding,
             report.get("expert_padding_flops_per_token"), 1e9, "none where a kernel skips it")]
    return [Item(f"{name}, {what}", None, value / unit, _beside(value, found, unit, why))
            for what, value, found, unit, why in rows if value]


def _beside(value: float, found: float | None, unit: float, why: str) -> str:
    if not found:
        return ""
    return f"compiled: {found / unit:.6g}, {found / value:.3f} times" + (f" ({why})" if why else "")


def draw(layouts: list[tuple[str, Predicted, dict[str, Any]]]) -> Any:
    """Memory by kind beside the compiled peak; copies between nodes over the node limit."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2))
    names = [name.removeprefix("deepseek_v3_") for name, _, _ in layouts]
    bottom = [0.0] * len(layouts)
    for kind in TrainingMemory._fields:
        sizes = [getattr(predicted.memory, kind) / 1e9 for _, predicted, _ in layouts]
        if any(sizes):
            left.bar(names, sizes, bottom=bottom, label=kind.replace("_", " "))
            bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for index, (_, predicted, report) in enumerate(layouts):
        if report:
            left.plot(index, report["peak_bytes"] / 1e9, "kv", label=None if index else "compiled peak")
        capacity = predicted.pod.hardware.hbm_bytes / 1e9
        left.plot((index - 0.45, index + 0.45), (capacity, capacity), "k--", label=None if index else "the device's")
    left.set(ylabel="GB of one device", title="Training DeepSeek-V3: calculated, and compiled")
    left.set_ylim(0, 1.45 * max(predicted.pod.hardware.hbm_bytes for _, predicted, _ in layouts) / 1e9)
    left.legend(fontsize=8, loc="upper left", ncols=3)
    limits = range(1, V3.n_group + 1)
    counted = [copies(limit) for limit in limits]
    right.plot(limits, [alone.mean() for _, alone, _, _ in counted], "o-", label="one an expert")
    right.plot(limits, [shared.mean() for _, _, shared, _ in counted], "s-", label="one a node")
    right.axvline(V3.topk_group, color="gray", linestyle=":", label="DeepSeek-V3's limit")
    right.set(xlabel="nodes that a token may reach", ylabel="mean copies of a token between nodes", ylim=(0, 8),
              title="Section 4.3")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
