"""torch's scaled matmul beside ours, where torch and its CUDA are at hand. Only its time is compared.

1x128 by 128x128 scales where this torch has them for the card, else a scale for each row and column, which is less work
for a kernel; the name says which.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.benchmark.timing import FLUSH_BYTES, Timing, paired


class Torch(NamedTuple):
    """torch, or why it is not timed."""

    module: Any
    problem: str


class TorchTiming(NamedTuple):
    """How long it took with which scales, or why there is no time."""

    scales: str
    timing: Timing | None
    problem: str = ""


def find_torch() -> Torch:
    """Imports torch if it is there."""
    if importlib.util.find_spec("torch") is None:
        return Torch(None, "torch is not installed")
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except (ImportError, OSError) as error:
        return Torch(None, f"torch cannot be imported: {str(error).splitlines()[0]}")
    if not torch.cuda.is_available():
        return Torch(None, "torch has no CUDA device")
    return Torch(torch, "")


def time_product(torch: Any, m: int, n: int, k: int, calls: int = 16, repeats: int = 11) -> TorchTiming:
    """x [M, K] by w [N, K], bfloat16 out."""
    junk = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    problems = []
    for scales, make in (("blocks", _with_blocks), ("rows", _with_rows)):
        try:
            run = make(torch, m, n, k)
            run()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            problems.append(f"{scales}: {str(error).splitlines()[0]}")
            continue

        def with_call(run: Callable[[], Any] = run) -> Any:
            junk.add_(1)
            return run()
        timing = paired(lambda: junk.add_(1), with_call, lambda _: torch.cuda.synchronize(), calls, repeats)
        return TorchTiming(scales, timing)
    return TorchTiming("", None, "; ".join(problems))


def _values(torch: Any, m: int, n: int, k: int) -> tuple[Any, Any]:
    """x by rows and w^T by columns, as torch asks for."""
    x, w = (torch.randn(size, k, device="cuda").to(torch.float8_e4m3fn) for size in (m, n))
    return x, w.t()


def _with_blocks(torch: Any, m: int, n: int, k: int) -> Callable[[], Any]:
    """Scales of neighbouring rows lie side by side, and those of a block's columns, as torch asks for."""
    x, w_T = _values(torch, m, n, k)
    x_scales = torch.ones(-(-k // 128), m, device="cuda").t()
    w_scales = torch.ones(-(-n // 128), -(-k // 128), device="cuda").t()
    return lambda: torch._scaled_mm(x, w_T, scale_a=x_scales, scale_b=w_scales, out_dtype=torch.bfloat16)


def _with_rows(torch: Any, m: int, n: int, k: int) -> Callable[[], Any]:
    x, w_T = _values(torch, m, n, k)
    x_scales, w_scales = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    return lambda: torch._scaled_mm(x, w_T, scale_a=x_scales, scale_b=w_scales, out_dtype=torch.bfloat16,
                                    use_fast_accum=True)
