"""Runs a script's `main` in this process, for what it tells and what it refuses."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any


def run_script(script: ModuleType, monkeypatch: Any, capfd: Any, *options: str) -> tuple[Any, str]:
    """The value that it prints with --json, and what it writes to standard error."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", "--json", *options])
    with open(1, "w", closefd=False) as real:  # as in a process of its own
        monkeypatch.setattr(sys, "stdout", real)
        script.main()
    told = capfd.readouterr()
    return json.loads(told.out), told.err
