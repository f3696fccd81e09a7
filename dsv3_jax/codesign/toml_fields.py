"""A TOML file of physical quantities, read field by field; what cannot be is refused with file, field and remedy."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError


class Fields:
    """One table of a file. Every method raises `ConfigError` for a value that is missing or cannot be."""

    def __init__(self, path: Path, values: dict[str, Any], known: Iterable[str], table: str = ""):
        self.path, self.values, self.table = path, values, table
        names = tuple(known)
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise self.wrong(name, values[name], f"is no field{f'; did you mean {near[0]}' if near else ''}? "
                                 f"Choose from {', '.join(names)}")

    @classmethod
    def of_file(cls, path: Path, known: Iterable[str]) -> Fields:
        """The top of the file."""
        try:
            return cls(path, tomllib.loads(path.read_text()), known)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}): name a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error

    def wrong(self, name: str, value: Any, remedy: str) -> ConfigError:
        """The error that `value` of the field `name` is."""
        return ConfigError(f"{self.path}: {self.table}{name} ({value!r}) {remedy}")

    def missing(self, name: str, what: str) -> ConfigError:
        """The error that there is no such field."""
        return ConfigError(f"{self.path}: {self.table}{name} is missing: give {what}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = self.values.get(name, default)
        if value is None:
            raise self.missing(name, "a text")
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, value, "must be a text that is not empty")
        return value

    def quantity(self, name: str, unit: str, least: float, default: float | None = None) -> float:
        """A finite number of `unit`; less than `least` is taken for a number in another unit, or for nonsense."""
        value = self.values.get(name, default)
        if value is None:
            raise self.missing(name, f"a number of {unit}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, value, f"must be a number of {unit}")
        if value < least:
            prefix = "must be positive, in" if value <= 0 else "is too little to be in"
            raise self.wrong(name, value, f"{prefix} {unit}: write at least {least:g} (100 giga is 100e9)")
        return value

    def whole(self, name: str, least: int, default: int | None = None) -> int:
        """A whole number."""
        value = self.quantity(name, "pieces", -math.inf, default)
        if value < least or value != int(value):
            raise self.wrong(name, value, f"must be a whole number of at least {least}")
        return int(value)

    def within(self, table: str, known: Iterable[str]) -> Fields:
        """The table of that name; an empty one where there is none."""
        values = self.values.get(table, {})
        if not isinstance(values, dict):
            raise self.wrong(table, values, f"must be a table: write [{self.table}{table}] and its fields below")
        return Fields(self.path, values, known, f"{self.table}{table}.")
