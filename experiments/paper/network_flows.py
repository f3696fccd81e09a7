"""Bandwidths of collectives and of expert parallelism, from flows on the network (paper 1, figures 5 to 8).

  python experiments/paper/network_flows.py
  python experiments/paper/network_flows.py --tokens 512 --hashes 1000 --out network_flows

Takes about a minute of processor time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from dsv3_jax.codesign.checks import at_least
from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.networks import deepep, fat_tree, nccl, patterns
from dsv3_jax.codesign.networks.cluster import Cluster, Rates
from dsv3_jax.codesign.networks.losses import Times, times_after
from dsv3_jax.codesign.networks.routing import Flows, Forward, Policy, joined, routes
from dsv3_jax.codesign.networks.shortest_paths import ShortestPaths
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.expert_parallel.topology import Topology
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

H800 = hardware("h800")
CHART = "the paper's is read off a chart"
PLATEAUS = {32: 59.0, 64: 51.0, 128: 47.0}
"""GB/s for large messages, figure 5, read off the chart: third-party readings, as are figure 8's."""
STARTUP = 30e-6
"""Seconds of an all-to-all of small messages, figure 6, read off the chart."""
ROUTED = {8: {"ecmp": 45.0, "adaptive": 57.0, "static": 57.0}, 4: {"ecmp": 83.0, "adaptive": 103.0, "static": 103.0},
          2: {"ecmp": 97.0, "adaptive": 190.0, "static": 190.0}}
"""GB/s by tensor parallelism and routing, figure 8, read off the chart; all-gather and reduce-scatter alike."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """How much is drawn at random."""

    tokens: int = 4096
    """Of a GPU in figure 7; the paper has 4,096."""
    hashes: int = 100
    """Of ECMP in figure 8, over which the mean is taken."""

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, hashes=self.hashes)


TEXT = """Flows on graphs of switches share links max-min fairly; rates are computed anew as flows end. NVLink inside \
nodes is links like any others, and what changes its rail is forwarded over it.

Two figures of DeepEP's are used up to calibrate two rates of the H800: dispatch on 64 GPUs gives the NIC's \
({nic:.1f} GB/s of 50), on 8 GPUs NVLink's ({nvlink:.1f} GB/s of 200). Everything else of figures 5 to 7 is then \
predicted. DeepEP's bandwidths are logical: rows to a token's own node count, and never meet a NIC, so on 4, 8 and 16 \
nodes a NIC of one rate shows as 4/3, 8/7 and 16/15 of it; on two nodes NVLink, which every row crosses for each GPU \
that wants it, is full before the NIC is half busy. NCCL's all-to-all counts what stays in the node alike, and shows \
the same rate.

Of DeepEP's low-latency kernels the two times on 8 GPUs are used up as well: what they take beyond their bytes over \
NVLink is what every number of GPUs is given.

Figure 8's layout is not published. With tensor parallelism of t in a node, 8/t of its NICs serve one data-parallel \
group. 57 GB/s at t = 8, on a NIC of 50, is S/time of a gather by 8 members (50 times 8/7), so 8 nodes are taken: \
under two leaves of 64 ports, the least where cables can collide. NICs and cables have their nominal 50 GB/s, and \
nothing else is calibrated; ECMP is the mean over {hashes} hashes.

Losses and policies on 2,048 GPUs (256 nodes, eight planes) are ours to add, at nominal rates, where cables have \
nothing to spare over NICs."""


def all_to_all_items(rates: Rates) -> list[Item]:
    """Figure 5's plateaus."""
    items = []
    for gpus, plateau in PLATEAUS.items():
        planes, rails = (all_to_all(kind, gpus // 8, rates) for kind in ("MPFT", "MRFT"))
        items.append(Item(f"figure 5, all-to-all on {gpus} GPUs, MPFT, GB/s", plateau, planes / 1e9,
                          f"predicted with the NIC's rate of DeepEP on 64 GPUs; {CHART}"))
        items.append(Item(f"figure 5, all-to-all on {gpus} GPUs, MRFT over MPFT", 1.0, rails / planes,
                          "predicted: nodes of a group share a leaf for each rail in both, so all ways are alike; the "
                          "paper's bars are near-identical"))
    return items


@functools.cache
def all_to_all(kind: str, nodes: int, rates: Rates) -> float:
    """Algorithm bandwidth in bytes/s."""
    return nccl.all_to_all_bandwidth(Cluster(networks_of(nodes)[kind], rates), nodes)


def networks_of(nodes: int) -> dict[str, Any]:
    """What figure 5 compares."""
    return {"MPFT": fat_tree.multi_plane(64, nodes), "MRFT": fat_tree.multi_rail(64, nodes)}


def latency_items(rates: Rates) -> list[Item]:
    """Figure 6: the largest difference over sizes of 64 B to 16 GiB on 16 GPUs."""
    seconds = {kind: [size / message(kind, 2, size, rates) for size in 64 * 4.0 ** np.arange(15)]
               for kind in ("MPFT", "MRFT")}
    worst = max(abs(a / b - 1) for a, b in zip(seconds["MPFT"], seconds["MRFT"], strict=True))
    return [Item("figure 6, all-to-all on 16 GPUs, MPFT and MRFT differ at most by, %", None, 100 * worst,
                 "predicted: two nodes meet on the same leaves in both; the paper shows -1.2 to +1.1, read off the "
                 "chart, and calls it negligible: what repetitions differ by")]


def message(kind: str, nodes: int, size: float, rates: Rates) -> float:
    """Bytes/s of an all-to-all of `size` bytes."""
    return nccl.message_bandwidth(size, all_to_all(kind, nodes, rates), STARTUP)


def deepep_bandwidths(rates: Rates, tokens: int) -> dict[int, deepep.Kernel]:
    """GB/s by GPUs."""
    told = {gpus: deepep.exchange(gpus // 8, tokens).bandwidth(rates) for gpus in deepep.PUBLISHED}
    return {gpus: deepep.Kernel(*(value / 1e9 for value in kernel)) for gpus, kernel in told.items()}


def deepep_items(calibrated: dict[int, deepep.Kernel], papers: dict[int, deepep.Kernel]) -> list[Item]:
    """Figure 7, with the calibrated rates and with those of the paper's section 4.3."""
    items = []
    for gpus, published in deepep.PUBLISHED.items():
        where = "figure 7" if gpus > 8 else "DeepEP docs/legacy.md, NVLink"
        for part in deepep.Kernel._fields:
            name = f"{where}, {part} on {gpus} GPUs, GB/s"
            printed, ours = getattr(published, part) / 1e9, getattr(calibrated[gpus], part)
            if part == "dispatch" and gpus in (8, 64):
                rate = "NIC's" if gpus == 64 else "NVLink's"
                items.append(Item(name, None, ours, f"an input: the paper's, gives the {rate} rate"))
                continue
            full = "NVLink is full" if gpus <= 16 else "the NIC is full"
            items.append(Item(name, printed, ours, f"predicted from dispatch on 8 and 64 GPUs; {full}"))
            if gpus == 16:
                items[-1] = dataclasses.replace(items[-1], note=items[-1].note + ", as rows are forwarded to all GPUs "
                                                "that want them; forwarding itself costs the kernels more than is "
                                                "modelled")
    items += [Item(f"figure 7, {part} on {gpus} GPUs at the paper's effective rates, GB/s",
                   getattr(deepep.PUBLISHED[gpus], part) / 1e9, getattr(papers[gpus], part),
                   "nothing calibrated: NIC 40 and NVLink 160 GB/s, section 4.3"
                   + ("; forwarding kernels do not reach these 160" if gpus == 16 else ""))
              for gpus in (16, 32, 64, 128) for part in deepep.Kernel._fields]
    return items


def low_latency_items(rates: Rates) -> list[Item]:
    """DeepEP's other kernels, which the paper names and does not chart."""
    startup, items = deepep.calibrated_startup(rates), []
    for gpus, published in deepep.LOW_LATENCY.items():
        if gpus == 8:
            items += [Item(f"DeepEP docs/legacy.md, low-latency {part} on 8 GPUs, us", None,
                           getattr(published, part) * 1e6, f"an input: {getattr(startup, part) * 1e6:.0f} us of it are "
                           "beyond its bytes, and taken for all") for part in deepep.Kernel._fields]
            continue
        ours = deepep.low_latency(gpus, rates, startup, draws=2 if gpus < 128 else 1)
        items += [Item(f"DeepEP docs/legacy.md, low-latency {part} on {gpus} GPUs, us", getattr(published, part) * 1e6,
                       getattr(ours, part) * 1e6,
                       "predicted: bytes at the rates above, waiting for the busiest NIC, and what 8 GPUs take beyond "
                       "theirs")
                  for part in deepep.Kernel._fields]
    return items


Routed = dict[int, dict[str, np.ndarray]]
"""Tensor parallelism -> routing -> GB/s, [hashes], mean over groups."""


def routed_bandwidths(hashes: int) -> Routed:
    """Figure 8: eight nodes under two leaves."""
    cluster = Cluster(fat_tree.two_layer(64, 64), Rates.of(H800, "nominal"))
    paths = ShortestPaths(cluster.network)
    told: Routed = {}
    for tp in ROUTED:
        rings = nccl.data_parallel_rings(np.arange(8), 8, tp)

        def mean(policy: Policy, seed: int, queue_pairs: int = 1, rings: nccl.Rings = rings) -> float:
            bandwidths = nccl.ring_bandwidths(cluster, rings, policy, seed=seed, queue_pairs=queue_pairs, paths=paths)
            return float(bandwidths.mean()) / 1e9
        told[tp] = {"ecmp": np.array([mean("ecmp", seed) for seed in range(hashes)]),
                    "ecmp, 4 queue pairs": np.array([mean("ecmp", seed, 4) for seed in range(hashes)]),
                    "adaptive": np.array([mean("adaptive", 0)]), "static": np.array([mean("static", 0)])}
    return told


def routed_items(told: Routed) -> list[Item]:
    """Figure 8."""
    items = []
    for tp, read in ROUTED.items():
        for policy, value in read.items():
            note = f"predicted, with no collisions; {CHART}"
            if policy == "ecmp":
                low, high = np.quantile(told[tp]["ecmp"], [0.05, 0.95])
                among = "among them" if low <= value <= high else "elsewhere"
                note = (f"predicted, a mean: nine hashes in ten give {low:.0f} to {high:.0f}; {CHART}, tells of no "
                        f"hash, and lies {among}")
            items.append(Item(f"figure 8, RoCE, all-gather and reduce-scatter, TP={tp}, {policy}, GB/s", value,
                              float(told[tp][policy].mean()), note))
        items.append(Item(f"RoCE, all-gather, TP={tp}, ecmp with 4 queue pairs, GB/s", None,
                          float(told[tp]["ecmp, 4 queue pairs"].mean()),
                          "each flow cut into four that are hashed alone: collisions cost less"))
    return items


def training_flows(scattered: bool, tokens: int = 64) -> Flows:
    """Dispatch of V3's training on 2,048 GPUs: 32 groups of 64, on nodes side by side or anywhere."""
    nodes = np.random.default_rng(0).permutation(256) if scattered else np.arange(256)
    experts_TK = deepep.choices(8, tokens * 64)
    gpus = (8 * nodes.reshape(32, 8, 1) + np.arange(8)).reshape(32, 64)
    return joined(*(patterns.dispatch(experts_TK, Topology(deepep.EXPERTS, 8, 8), 7392.0, gpu_D) for gpu_D in gpus))


def deployed() -> Cluster:
    """2,048 GPUs on eight planes."""
    return Cluster(fat_tree.multi_plane(64, 256), Rates.of(H800, "nominal"))


Lost = dict[str, dict[str, Times]]
"""Routing -> what is lost -> times over those of adaptive routing on the whole network."""


def lost(policies: tuple[Policy, ...] = ("adaptive", "ecmp")) -> Lost:
    """Training's dispatch after one loss, groups scattered."""
    flows = training_flows(scattered=True)
    seconds = {policy: times_after(deployed(), flows, policy) for policy in policies}
    base = seconds["adaptive"]["nothing"]
    return {policy: {name: Times(told.last / base.last, told.median / base.median) for name, told in losses.items()}
            for policy, losses in seconds.items()}


def loss_items(told: Lost) -> list[Item]:
    """How much longer, per loss."""
    return [Item(f"2,048 GPUs, dispatch of 32 groups on scattered nodes, {policy}, {name} lost: time over that of "
                 "adaptive routing, nothing lost", None, ratio.last,
                 f"the last group's; median flow {ratio.median:.3f}; NICs that are cut off send by the node's others "
                 "over NVLink")
            for policy, losses in told.items() for name, ratio in losses.items()
            if (policy, name) != ("adaptive", "nothing")]


def placement_items() -> list[Item]:
    """Time of training's dispatch by routing, over that of groups side by side, which never leave their leaves."""
    cluster, paths, seconds = deployed(), ShortestPaths(deployed().network), {}
    choices: tuple[tuple[bool, Policy], ...] = ((False, "static"), (True, "adaptive"), (True, "static"), (True, "ecmp"))
    for scattered, policy in choices:
        flows = training_flows(scattered)
        matrix = routes(cluster, flows, policy, paths=paths)
        seconds[scattered, policy] = complete(matrix, cluster.capacity_L(), flows.bytes_F, resolution=0.02).seconds
    base = seconds.pop((False, "static"))
    return [Item(f"2,048 GPUs, dispatch of 32 groups on scattered nodes, {policy}: time over groups side by side", None,
                 value / base, "eight nodes side by side share a leaf, where there is nothing to choose")
            for (_, policy), value in seconds.items()]


def forwarding_items(nodes: int = 32, ports: int = 64) -> list[Item]:
    """An all-to-all on one tree with every NIC sending straight to every other, and forwarded over NVLink."""
    cluster = Cluster(fat_tree.multi_rail(ports, nodes), Rates.of(H800, "nominal"))
    flows, paths, items = patterns.all_pairs(nodes, 8, 1e6), ShortestPaths(cluster.network), []
    ideal = 8 * (nodes - 1) * 1e6 / cluster.rates.nic
    ways: tuple[tuple[Forward, Policy, str], ...] = (
        ("none", "ecmp", "straight, across spines"), ("none", "adaptive", "straight, across spines"),
        ("sender", "ecmp", "changing rails over NVLink first, as planes must"))
    for forward, policy, words in ways:
        matrix = routes(cluster, flows, policy, forward=forward, paths=paths)
        done = complete(matrix, cluster.capacity_L(), flows.bytes_F, resolution=0.05)
        items.append(Item(f"MRFT, all-to-all on {8 * nodes} GPUs, {words}, {policy}: part of the NICs' rate", None,
                          ideal / done.seconds, "at nominal rates; forwarding keeps traffic below the leaves, where "
                          "nothing collides, and NVLink has the room"))
    return items


def draw_all_to_all(rates: Rates) -> Any:
    """Figures 5 and 6."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = 2.0 ** np.arange(27, 35)
    for gpus, plateau in PLATEAUS.items():
        for kind, style in (("MPFT", "-"), ("MRFT", "x")):
            values = [message(kind, gpus // 8, size, rates) / 1e9 for size in sizes]
            left.plot(sizes / 2 ** 20, values, style, color=f"C{gpus // 64}", label=f"{gpus} GPUs, {kind}")
        left.axhline(plateau, color=f"C{gpus // 64}", ls=":", lw=1)
    left.plot([], [], "k:", label="plateau, read off figure 5")
    left.set(xscale="log", xlabel="MiB a GPU", ylabel="algorithm bandwidth, GB/s", ylim=(0, 70), title="all-to-all")
    small = 2.0 ** np.arange(6, 35)
    for kind, style in (("MPFT", "-"), ("MRFT", "x")):
        seconds = np.array([size / message(kind, 2, size, rates) for size in small])
        right.plot(small, 1e6 * seconds, style, label=f"16 GPUs, {kind}")
    right.set(xscale="log", yscale="log", xlabel="bytes a GPU", ylabel="us",
              title="all-to-all; 30 us of small messages read off figure 6")
    for axis in (left, right):
        axis.legend(fontsize=8)
    return figure


def draw_deepep(calibrated: dict[int, deepep.Kernel], papers: dict[int, deepep.Kernel]) -> Any:
    """Figure 7."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    gpus = [count for count in deepep.PUBLISHED if count > 8]
    for axis, part in zip(axes, deepep.Kernel._fields, strict=True):
        axis.plot(gpus, [getattr(deepep.PUBLISHED[count], part) / 1e9 for count in gpus], "ks", mfc="none", ms=9,
                  label="printed on figure 7")
        axis.plot(gpus, [getattr(calibrated[count], part) for count in gpus], "o-",
                  label="rates calibrated on dispatch, 8 and 64 GPUs")
        axis.plot(gpus, [getattr(papers[count], part) for count in gpus], "o--", label="section 4.3's 40 and 160 GB/s")
        axis.set(xscale="log", xticks=gpus, xticklabels=gpus, xlabel="GPUs", ylabel="logical GB/s a GPU", title=part,
                 ylim=(0, 70))
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="lower left")
    return figure


def draw_routed(told: Routed) -> Any:
    """Figure 8."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for index, policy in enumerate(("ecmp", "ecmp, 4 queue pairs", "adaptive", "static")):
        at = np.arange(len(ROUTED)) + 0.2 * (index - 1.5)
        axis.bar(at, [told[tp][policy].mean() for tp in ROUTED], 0.18, label=policy)
        spread = np.array([np.quantile(told[tp][policy], [0.05, 0.5, 0.95]) for tp in ROUTED])
        if policy.startswith("ecmp"):
            axis.vlines(at, spread[:, 0], spread[:, 2], color="k", lw=1)
        if policy in ROUTED[8]:
            axis.plot(at, [ROUTED[tp][policy] for tp in ROUTED], "ks", mfc="w", ms=7)
    axis.plot([], [], "ks", mfc="w", label="read off figure 8")
    axis.plot([], [], "k-", lw=1, label="nine hashes in ten")
    axis.set(xticks=range(len(ROUTED)), xticklabels=[f"TP={tp}" for tp in ROUTED], ylabel="algorithm bandwidth, GB/s",
             title="RoCE, all-gather; layout assumed: 8 nodes under 2 leaves")
    axis.legend(fontsize=8)
    return figure


def draw_losses(told: Lost) -> Any:
    """Slowdown per loss."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for index, (policy, losses) in enumerate(told.items()):
        names = list(losses)
        at = np.arange(len(names)) + 0.4 * (index - 0.5)
        axis.bar(at, [losses[name].last for name in names], 0.36, label=f"{policy}, last group")
        axis.plot(at, [losses[name].median for name in names], "k_", ms=14)
        axis.set(xticks=range(len(names)), xticklabels=[name.replace(" between", "\nbetween") for name in names])
    axis.plot([], [], "k_", label="median flow between nodes")
    axis.axhline(1, color="gray", lw=0.7)
    axis.set(ylabel="time over the whole network's, adaptive", ylim=(0, 3.2),
             title="2,048 GPUs, dispatch of 32 groups of 64, one part lost")
    axis.legend(fontsize=8)
    return figure


def section(options: Options = Options()) -> Section:
    """Figures 5 to 8."""
    rates = deepep.calibrated(options.tokens)
    calibrated = deepep_bandwidths(rates, options.tokens)
    papers = deepep_bandwidths(Rates.of(H800), options.tokens)
    routed, losses = routed_bandwidths(options.hashes), lost()
    items = (*all_to_all_items(rates), *latency_items(rates), *deepep_items(calibrated, papers),
             *low_latency_items(rates), *routed_items(routed), *placement_items(), *loss_items(losses),
             *forwarding_items())
    return Section("Traffic on the network (paper 1, figures 5 to 8)",
                   TEXT.format(nic=rates.nic / 1e9, nvlink=rates.nvlink / 1e9, hashes=options.hashes), items,
                   (("network_all_to_all", functools.partial(draw_all_to_all, rates)),
                    ("network_deepep", functools.partial(draw_deepep, calibrated, papers)),
                    ("network_routing", functools.partial(draw_routed, routed)),
                    ("network_losses", functools.partial(draw_losses, losses))))


if __name__ == "__main__":
    run(section, __doc__, Options)
