"""What is read from a compiled program, where there is nothing to find and where there is."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.kernels import compile_kernel

COMPILERS = {"h100": "jax_cuda13_plugin", "v5p": "libtpu"}


def of_compilers(*hardware: str) -> list:
    return [pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(COMPILERS[name]) is None,
                                                        reason="needs the extra `aot`")) for name in hardware]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hardware", of_compilers("h100", "v5p"))
def test_products_of_xla_are_dots_and_no_kernels(hardware, dtype):
    """Also where the compiler fuses something to them."""
    x = jax.ShapeDtypeStruct((256, 256), dtype)
    made = compile_kernel(hardware, lambda x, y: jnp.tanh(x @ y) @ y, [x, x])
    assert (made.kernels, made.dots) == (0, 2)


@pytest.mark.parametrize("hardware", of_compilers("h100", "v5p"))
def test_sums_are_neither(hardware):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    made = compile_kernel(hardware, lambda x: x + jnp.sum(x), [x])
    assert (made.kernels, made.dots) == (0, 0)
    assert made.spilled_bytes == (0 if hardware == "h100" else None)
