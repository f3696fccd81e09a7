"""What small models refuse."""

from __future__ import annotations

import math

from dsv3_jax.config import ConfigError


def positive(**fields: float) -> None:
    """Each is a finite number above zero.

    Raises:
      ConfigError: one is not; names it.
    """
    for name, value in fields.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} ({value}) must be a finite number above 0")


def not_negative(**fields: float) -> None:
    """Each is a finite number, zero or more.

    Raises:
      ConfigError: one is not; names it.
    """
    for name, value in fields.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} ({value}) must be a finite number, 0 or more")


def share(**fields: float) -> None:
    """Each lies between 0 and 1, both included.

    Raises:
      ConfigError: one does not; names it.
    """
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} ({value}) must lie between 0 and 1")


def at_least(least: int, **fields: float) -> None:
    """Each is a whole number of at least `least`.

    Raises:
      ConfigError: one is not; names it.
    """
    for name, value in fields.items():
        if value != int(value) or value < least:
            raise ConfigError(f"{name} ({value}) must be a whole number of at least {least}")


def at_most(name: str, value: int, most: int, why: str) -> None:
    """The field is not above `most`.

    Raises:
      ConfigError: it is; names it, and says why.
    """
    if value > most:
        raise ConfigError(f"{name} ({value}) must be at most {most}: {why}")


def even_ports(ports: int) -> None:
    """Half of a switch's ports can go up and half down.

    Raises:
      ConfigError: they cannot.
    """
    at_least(2, ports=ports)
    if ports % 2:
        raise ConfigError(f"ports ({ports}) must be even: a fat tree's switch has half of them up and half down")
