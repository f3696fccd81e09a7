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
