"""Topologies: what they are made of, cost, and how long a message takes (paper 1, tables 3 and 5).

  python experiments/paper/networks.py --out networks
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dsv3_jax.codesign.networks import cost, dragonfly, fat_tree, inventory, latency, slim_fly
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.codesign.networks.inventory import TABLE_3, Inventory, counted
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Section, run

PRINTED = {"FT2": Inventory(2_048, 96, 2_048), "MPFT": Inventory(16_384, 768, 16_384),
           "FT3": Inventory(65_536, 5_120, 131_072), "SF": Inventory(32_928, 1_568, 32_928),
           "DF": Inventory(261_632, 16_352, 384_272)}
"""Paper 1, table 3."""
BUILT = {"FT2": functools.partial(fat_tree.two_layer, 64), "MPFT": functools.partial(fat_tree.multi_plane, 64, 2048),
         "FT3": functools.partial(fat_tree.three_layer, 64),
         "DF": functools.partial(dragonfly.dragonfly, 16, 32, 16, 511)}
MEANS = {"FT2": "two-layer fat tree", "MPFT": "multi-plane fat tree", "FT3": "three-layer fat tree", "SF": "Slim Fly",
         "DF": "Dragonfly"}

TEXT = """Switches of 64 ports. Graphs are built and their parts counted; Slim Fly alone is counted by formula, since \
the table's size is that of q = 28, which is no power of a prime, so that no such graph exists (q = 27 and 29 are \
built, and stand on both sides).

Unit prices are not published. Two, {switch:,.0f} $ a switch and {link:,.0f} $ a link between switches, are fitted to \
FT2's cost of an endpoint and FT3's total; the others' costs follow from their parts. A message's time is that of its \
two ends and of each switch on its way (InfiniBand {ib.ends:.2f} and {ib.switch:.2f} us, RoCE {roce.ends:.2f} and \
{roce.switch:.2f} us); table 5's figures for one and three switches fix just these, so that the table is an input, and \
networks it does not have are predicted. Forwarding inside a node adds a message over NVLink."""


def inventory_items() -> list[Item]:
    """Table 3's counts."""
    items = []
    for name, printed in PRINTED.items():
        ours = counted(BUILT[name]()) if name in BUILT else TABLE_3[name]
        note = "counted on the graph" if name in BUILT else "by formula for q = 28, for which there is no graph"
        items += [Item(f"table 3, {name} ({MEANS[name]}), {part}", getattr(printed, part), getattr(ours, part), note)
                  for part in ("endpoints", "switches", "links")]
    for q in (27, 29):
        ours = counted(slim_fly.slim_fly(q))
        note = f"a graph that exists: {ours.switches:,} switches, {ours.links:,} links"
        items.append(Item(f"Slim Fly of q = {q}, endpoints", None, ours.endpoints, note))
    return items


def cost_items() -> list[Item]:
    """Table 3's costs."""
    prices, items = cost.fitted_prices(), []
    notes = {
        "MPFT": "eight of FT2, so what an endpoint costs was fitted",
        "SF": "predicted; {low:.1f} to {high:.1f} within the rounding of what was fitted",
        "DF": "predicted; rounding leaves {low:,.0f} to {high:,.0f}: a flat price is too dear for cables, most of "
              "which are short ones inside a group here",
    }
    for name, parts in TABLE_3.items():
        total, each = prices.of(parts) / 1e6, prices.of(parts) / 1e3 / parts.endpoints
        printed = cost.PRINTED[name]
        if name in ("FT2", "FT3"):
            said = (f"{printed.thousands_an_endpoint} k$ an endpoint" if name == "FT2"
                    else f"{printed.millions} M$ in all")
            items.append(Item(f"table 3, {name}, cost, M$", None, total, f"an input: prices are fitted to {said}"))
            continue
        low, high = (bound / 1e6 for bound in cost.range_within_rounding(parts))
        note = notes[name].format(low=low, high=high)
        items += [Item(f"table 3, {name}, cost, M$", printed.millions, total, note),
                  Item(f"table 3, {name}, cost of an endpoint, k$", printed.thousands_an_endpoint, each, note)]
    return items


def latency_items() -> list[Item]:
    """Table 5, and what follows from it."""
    layers = {"InfiniBand": latency.INFINIBAND, "RoCE": latency.ROCE}
    items = [Item(f"table 5, {name}, {where}, us", None, layer.message(switches) * 1e6, "an input: the paper's")
             for name, layer in layers.items() for where, switches in (("same leaf", 1), ("cross leaf", 3))]
    items.append(Item("table 5, NVLink, us", None, latency.NVLINK_SECONDS * 1e6, "an input: the paper's"))
    rest = "predicted from table 5's two figures for the layer"
    for name, layer in layers.items():
        items.append(Item(f"{name}, through three layers (five switches), us", None, layer.message(5) * 1e6, rest))
        items.append(Item(f"{name}, to another plane across leaves, us", None, latency.forwarded(layer, 3) * 1e6,
                          f"{rest}, and one forwarding over NVLink"))
    sizes = {"MPFT": fat_tree.multi_plane(64, 2048), "FT3": fat_tree.three_layer(40)}
    for name, network in sizes.items():
        where = " in its plane" if name == "MPFT" else ""
        items.append(Item(f"InfiniBand, mean to a random GPU{where}, {name} of {network.endpoints:,}, us", None,
                          latency.mean_message(network, latency.INFINIBAND) * 1e6, rest))
    items.append(Item("InfiniBand, mean to a random GPU on any plane, MPFT of 16,384, us", None,
                      any_plane(sizes["MPFT"]) * 1e6,
                      f"{rest}; seven in eight are on other planes and need NVLink: planes are faster than three "
                      "layers only for traffic that keeps to them, or that NVLink spreads anyway"))
    return items


def any_plane(network: Network, planes: int = 8) -> float:
    """Mean seconds over InfiniBand from a GPU to another one, by its own plane and then, in seven of eight cases,
    NVLink; by NVLink alone in its node."""
    others = network.endpoints - 1
    nodes = network.endpoints // planes
    straight = latency.mean_message(network, latency.INFINIBAND)
    forwarded = straight + latency.NVLINK_SECONDS
    return ((planes - 1) * latency.NVLINK_SECONDS + (nodes - 1) * (straight + (planes - 1) * forwarded)) / others


def draw_cost() -> Any:
    """Cost of an endpoint as each topology grows on switches of 64 ports."""
    pyplot, prices = import_pyplot(), cost.fitted_prices()
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    curves = {
        "FT2": [counted(fat_tree.two_layer(64, 64 * n)) for n in range(1, 33)],
        "MPFT": [counted(fat_tree.multi_plane(64, 64 * n)) for n in range(1, 33)],
        # A pod has 32 leaves and as many switches above; 1,024 cables a pod go to cores of 64 ports.
        "FT3": [Inventory(1024 * pods, 64 * pods + 16 * pods, 2048 * pods) for pods in range(2, 65, 2)],
        "SF": [inventory.slim_fly(q) for q in slim_fly.valid_q(17, 27)] + [TABLE_3["SF"]],
        "DF": [inventory.dragonfly(16, 32, 16, groups) for groups in range(2, 514, 7)],
    }
    for name, parts in curves.items():
        each = [prices.of(part) / 1e3 / part.endpoints for part in parts]
        style = {"lw": 2, "ls": "--", "zorder": 3} if name == "FT2" else {"lw": 2}  # it lies on MPFT's
        line, = axis.plot([part.endpoints for part in parts], each, label=f"{name}, {MEANS[name]}", **style)
        axis.plot([PRINTED[name].endpoints], [cost.PRINTED[name].thousands_an_endpoint], "s", mfc="none", ms=11,
                  color=line.get_color())
    axis.plot([], [], "ks", mfc="none", ms=11, label="printed in table 3")
    axis.set(xscale="log", xlabel="endpoints", ylabel="k$ an endpoint", ylim=(0, 8.5),
             title="Prices fitted to FT2 and FT3; every switch costs the same")
    axis.legend(fontsize=8, loc="lower left")
    return figure


def draw_latency() -> Any:
    """Mean time of a message to a random endpoint as networks grow."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    ports = (8, 16, 32, 48, 64)
    planes = [fat_tree.multi_plane(k, k * k // 2) for k in ports]
    curves = {
        "two-layer fat tree, or within a plane": [fat_tree.two_layer(k) for k in ports],
        "three-layer fat tree": [fat_tree.three_layer(k) for k in (8, 12, 16, 24, 32, 40)],
        "Slim Fly": [slim_fly.slim_fly(q) for q in (5, 7, 9, 13, 17, 23)],
        "Dragonfly": [dragonfly.dragonfly(p, 2 * p, p, 2 * p * p + 1) for p in (2, 3, 4, 6, 8)],
    }
    for name, networks in curves.items():
        seconds = np.array([latency.mean_message(network, latency.INFINIBAND) for network in networks])
        axis.plot([network.endpoints for network in networks], seconds * 1e6, "o-", label=name)
    axis.plot([network.endpoints for network in planes], [any_plane(network) * 1e6 for network in planes], "o--",
              label="multi-plane fat tree, any plane: forwarded over NVLink")
    for value, name in ((2.8, "same leaf"), (3.7, "cross leaf")):
        axis.axhline(value, color="gray", lw=0.7, ls=":")
        axis.annotate(f"table 5, {name}", (1, value), xycoords=("axes fraction", "data"), fontsize=7, ha="right",
                      va="bottom")
    axis.set(xscale="log", xlabel="endpoints", ylabel="us, mean to a random endpoint", ylim=(0, None),
             title="InfiniBand, constants from table 5")
    axis.legend(fontsize=8)
    return figure


def section() -> Section:
    """Tables 3 and 5."""
    prices = cost.fitted_prices()
    in_us = {name: latency.LinkLayer(layer.ends * 1e6, layer.switch * 1e6)
             for name, layer in (("ib", latency.INFINIBAND), ("roce", latency.ROCE))}
    return Section("Topologies: parts, cost, latency (paper 1, tables 3 and 5)",
                   TEXT.format(switch=prices.switch, link=prices.link, **in_us),
                   (*inventory_items(), *cost_items(), *latency_items()),
                   (("networks_cost", draw_cost), ("networks_latency", draw_latency)))


if __name__ == "__main__":
    run(section, __doc__)
