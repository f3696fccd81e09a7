"""Refusals of what no network can be, each with the field's name."""

from __future__ import annotations

import math

from dsv3_jax.config import ConfigError


def at_least(field: str, value: int, least: int = 1) -> None:
    """Raises `ConfigError` unless `value` is a whole number of at least `least`."""
    if value != int(value) or value < least:
        raise ConfigError(f"{field} ({value}) must be a whole number of at least {least}")


def at_most(field: str, value: int, most: int, why: str) -> None:
    """Raises `ConfigError` with `why` if `value` exceeds `most`."""
    if value > most:
        raise ConfigError(f"{field} ({value}) must be at most {most}: {why}")


def even_ports(ports: int) -> None:
    """Raises `ConfigError` unless half of a switch's ports can go up and half down."""
    at_least("ports", ports, 2)
    if ports % 2:
        raise ConfigError(f"ports ({ports}) must be even: a fat tree's switch has half of them up and half down")


def positive(field: str, value: float) -> None:
    """Raises `ConfigError` unless `value` is a positive, finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{field} ({value}) must be positive and finite")


def not_negative(field: str, value: float) -> None:
    """Raises `ConfigError` unless `value` is a finite number of at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{field} ({value}) must be finite and not negative")
