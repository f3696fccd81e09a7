"""What a program is compiled for, and the choice of a kernel by it.

The platform that a program is traced on says nothing of the one that it is lowered for, so the choice between platforms
is made by `platform_dependent`. Which card or chip of a platform is meant, the mesh says, or else the device at hand.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, Protocol

import jax

Backend = Literal["reference", "hopper", "tpu"]

_log = logging.getLogger(__name__)


_MODULES: dict[Backend, str] = {"reference": "reference", "hopper": "gpu", "tpu": "tpu"}


def backend_module(operation: str, backend: Backend) -> ModuleType:
    """The module of an operation's folder that computes it so. All have the same functions; they are loaded when first
    asked for, since kernels take a quarter of a second that a small CPU run need not pay."""
    return importlib.import_module(f"pallas_kernels.{operation}.{_MODULES[backend]}")


class Problem(Protocol):
    """What the choice depends on, as messages print it."""

    def __hash__(self) -> int:
        """A problem's misfits are told once."""

    def misfit(self, backend: Backend) -> str:
        """What the backend needs and does not find here; empty if it serves."""


def device_kind(platform: Literal["gpu", "tpu"], default: str) -> str:
    """The kind of device of this platform that the mesh names, or else of the one at hand, or else `default`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and getattr(device, "platform", platform) == platform:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == platform else default


def platform_named() -> str:
    """The platform of the mesh, or else that of the device at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def nvidia_is_hopper() -> bool:
    """Whether to compile for Hopper when compiling for NVIDIA.

    Where neither mesh nor device says, the program is lowered for elsewhere, and Hopper is what these models are for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu":
        return re.search(r"\bG?H\d+", device.device_kind) is not None
    return getattr(jax.devices()[0], "compute_capability", "9.0").startswith("9.")


def dispatch(run: Callable[..., Any], problem: Problem, backend: Backend | None, *operands: Any) -> Any:
    """`run(name, *operands)` with the backend of that name, or the one that each platform takes.

    Raises:
      ValueError: the named backend does not serve the problem.
    """
    if backend is not None:
        if need := problem.misfit(backend):
            raise ValueError(f"no {backend} kernel for {problem}: it needs {need}; backend=None takes one that serves")
        return run(backend, *operands)
    hopper = "" if nvidia_is_hopper() else "a Hopper card"
    choice: dict[str, Backend] = {}
    for name, need in (("hopper", hopper or problem.misfit("hopper")), ("tpu", problem.misfit("tpu"))):
        choice[name] = "reference" if need else name  # type: ignore[assignment]
        if need:
            _tell_once(problem, name, need)
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(run, "reference"),
        cuda=functools.partial(run, choice["hopper"]),
        default=functools.partial(run, choice["tpu"]))


@functools.cache
def _tell_once(problem: Problem, name: str, need: str) -> None:
    """Tracing does not know yet what it is for, so this is a warning only where such programs run."""
    level = logging.WARNING if jax.default_backend() == {"hopper": "gpu", "tpu": "tpu"}[name] else logging.DEBUG
    _log.log(level, "%s takes the slower reference: the %s kernel needs %s", problem, name, need)
