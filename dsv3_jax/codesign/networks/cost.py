"""What networks cost, from two unit prices: a switch and a cable between switches.

Paper 1 takes its costs from Slim Fly's method and publishes no unit prices; they are fitted here to two of its totals.
A flat price leaves out that cables differ in length: most of a Dragonfly's stay inside a group, short and of copper.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.codesign.networks.inventory import TABLE_3, Inventory
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Prices:
    """Dollars."""

    switch: float
    link: float

    def __post_init__(self) -> None:
        positive(switch=self.switch)
        not_negative(link=self.link)

    def of(self, inventory: Inventory) -> float:
        """Dollars in all."""
        return self.switch * inventory.switches + self.link * inventory.links


def fit(first: tuple[Inventory, float], second: tuple[Inventory, float]) -> Prices:
    """The prices that give both inventories their totals in dollars.

    Raises:
      ConfigError: both have the same links to a switch, or only a price that is not positive fits.
    """
    counts = np.array([[inventory.switches, inventory.links] for inventory, _ in (first, second)], float)
    if abs(np.linalg.det(counts)) < 1e-9 * counts.max() ** 2:
        raise ConfigError("first, second: with as many links to a switch in both, two prices cannot be told apart")
    switch, link = np.linalg.solve(counts, [first[1], second[1]])
    return Prices(float(switch), float(link))


@dataclasses.dataclass(frozen=True)
class Printed:
    """Paper 1, table 3: a total, and its share of one endpoint."""

    millions: float
    thousands_an_endpoint: float


PRINTED = {"FT2": Printed(9, 4.39), "MPFT": Printed(72, 4.39), "FT3": Printed(491, 7.5), "SF": Printed(146, 4.4),
           "DF": Printed(1522, 5.8)}


def fitted_prices() -> Prices:
    """From the finer figure of FT2, 4.39 k$ an endpoint, and FT3's total of 491 M$."""
    return fit(*_totals(PRINTED["FT2"].thousands_an_endpoint, PRINTED["FT3"].millions))


def _totals(thousands_an_endpoint: float, millions: float) -> tuple[tuple[Inventory, float], tuple[Inventory, float]]:
    ft2, ft3 = TABLE_3["FT2"], TABLE_3["FT3"]
    return (ft2, thousands_an_endpoint * 1e3 * ft2.endpoints), (ft3, millions * 1e6)


def range_within_rounding(inventory: Inventory) -> tuple[float, float]:
    """Least and greatest total in dollars that prices fitted to any values which print as FT2's and FT3's give."""
    corners = itertools.product((-0.005, 0.005), (-0.5, 0.5))
    totals = [fit(*_totals(4.39 + fine, 491 + coarse)).of(inventory) for fine, coarse in corners]
    return min(totals), max(totals)
