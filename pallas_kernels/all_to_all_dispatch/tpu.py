"""Not yet."""

from __future__ import annotations

from typing import Any


def misfit(problem: Any) -> str:
    """None is served."""
    return "a kernel"
