"""What is measured: each operation at the shapes of DeepSeek-V3.

Dimensions: M rows or tokens, N columns of the result, K terms of the sum, E groups, P rows of all groups, A and B the
sides of a weight's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.benchmark import attention_cases, rivals
from pallas_kernels.benchmark.case import OPERATIONS, Case, OperationName
from pallas_kernels.benchmark.rivals import Rival
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantise import quantise, quantise_both, quantise_transposed, swiglu_quantise
from pallas_kernels.targets import Backend

ROWS = (1, 64, 128, 4096)
WEIGHTS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""(N, K) of DeepSeek-V3's linear layers; 576 is no multiple of a block."""
TOKENS, WIDTHS = 4096, (7168, 2048)
GROUPS, ROWS_PER_GROUP = 4, 8192
EXPERTS = ((4096, 7168), (7168, 2048))
"""(N, K) of an expert's two products."""


def published_cases(operations: Sequence[OperationName] = OPERATIONS, rows: Sequence[int] = ()) -> list[Case]:
    """Every case of these operations; with `rows`, those that have one of these numbers of rows."""
    groups, uneven = GROUPS * (ROWS_PER_GROUP,), (5760, 10624, 0, 12800)
    makers: dict[OperationName, Callable[[], list[Case]]] = {
        "fp8_matmul": lambda: [product(m, n, k) for n, k in WEIGHTS for m in ROWS],
        "fp8_wgrad": lambda: [gradient(TOKENS, n, k) for n, k in WEIGHTS],
        "grouped_fp8_matmul": lambda: [grouped_product(groups, uneven, n, k) for n, k in EXPERTS],
        "grouped_fp8_wgrad": lambda: [grouped_gradient(groups, uneven, n, k) for n, k in EXPERTS],
        "grouped_matmul": lambda: [grouped_bf16_product(groups, uneven, n, k) for n, k in EXPERTS]}
    makers |= {name: functools.partial(_casts, name) for name in CASTS} | attention_cases.PUBLISHED
    return [case for name in operations for case in makers[name]() if not rows or case.rows in rows]


def _casts(name: OperationName) -> list[Case]:
    return [cast(name, TOKENS, width) for width in WIDTHS]


def small_cases(operations: Sequence[OperationName] = OPERATIONS) -> list[Case]:
    """A case of each operation that an interpreter finishes in seconds, with parts of tiles where kernels take them."""
    cases = {"fp8_matmul": product(72, 192, 256), "fp8_wgrad": gradient(256, 64, 128),
             "grouped_fp8_matmul": grouped_product((128, 128), (0, 128), 192, 256),
             "grouped_fp8_wgrad": grouped_gradient((128, 128), (0, 128), 64, 128),
             "grouped_matmul": grouped_bf16_product((128, 128), (0, 128), 128, 128), **attention_cases.small()}
    return [cases[name] if name in cases else cast(name, 160, 256) for name in operations]


def product(m: int, n: int, k: int) -> Case:
    """x w^T, as forward and input gradient have it."""
    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        x, w = jax.random.split(key)
        return *_in_rows(x, m, k), *_in_blocks(w, n, k)
    return Case("fp8_matmul", f"M={m} N={n} K={k}", m, draw, fp8_matmul, _as_float32(fp8_matmul), 2. * m * n * k,
                key=tuning.Key("product", m, n, k), rivals=rivals.of_product(jnp.bfloat16), torch_shape=(m, n, k))


def gradient(tokens: int, n: int, k: int) -> Case:
    """A weight's gradient over all tokens, added to what is there."""
    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        x, y, before = jax.random.split(key, 3)
        return *_in_rows(x, n, tokens), *_in_rows(y, k, tokens), 32 * jax.random.normal(before, (n, k))
    return Case("fp8_wgrad", f"A={n} B={k} M={tokens}", tokens, draw, fp8_wgrad, _as_float32(fp8_wgrad),
                2. * tokens * n * k, key=tuning.Key("gradient", n, k, tokens), whole_tiles=True,
                rivals=rivals.of_product(jnp.float32, accumulate=True))


def grouped_product(sizes: tuple[int, ...], other_sizes: tuple[int, ...], n: int, k: int) -> Case:
    """Rows of each expert times its matrix."""
    rows, groups = sum(sizes), len(sizes)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        x, w = jax.random.split(key)
        return *_in_rows(x, rows, k), *_in_blocks(w, groups, n, k), jnp.asarray(sizes, jnp.int32)
    return Case("grouped_fp8_matmul", f"E={groups} P={rows} N={n} K={k}", rows, draw, grouped_fp8_matmul,
                _as_float32(grouped_fp8_matmul), 2. * rows * n * k, other_sizes=other_sizes,
                key=tuning.Key("product", rows, n, k, groups), rivals=rivals.of_even_groups(groups))


def grouped_gradient(sizes: tuple[int, ...], other_sizes: tuple[int, ...], n: int, k: int) -> Case:
    """The gradients of the experts' matrices."""
    rows, groups = sum(sizes), len(sizes)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        x, y = jax.random.split(key)
        return *_in_rows(x, n, rows), *_in_rows(y, k, rows), jnp.asarray(sizes, jnp.int32)
    return Case("grouped_fp8_wgrad", f"E={groups} A={n} B={k} P={rows}", rows, draw, grouped_fp8_wgrad,
                _as_float32(grouped_fp8_wgrad), 2. * rows * n * k, other_sizes=other_sizes,
                key=tuning.Key("gradient", n, k, rows, groups), rivals=rivals.of_even_group_gradients(groups))


def grouped_bf16_product(sizes: tuple[int, ...], other_sizes: tuple[int, ...], n: int, k: int) -> Case:
    """Rows of each expert times its matrix in bfloat16, what the float8 product must beat."""
    rows, groups = sum(sizes), len(sizes)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        x, w = jax.random.split(key)
        return (jax.random.normal(x, (rows, k), jnp.bfloat16), jax.random.normal(w, (groups, k, n), jnp.bfloat16),
                jnp.asarray(sizes, jnp.int32))

    def run(x: jax.Array, w: jax.Array, group_sizes_E: jax.Array, *, backend: Backend | None = None) -> jax.Array:
        # On a TPU the operation chooses: v5p has a kernel of XLA's own.
        on_tpu = None if jax.default_backend() == "tpu" else "megablox"
        names: dict[Any, Any] = {"reference": "tiled", "hopper": "hopper", "tpu": on_tpu, None: None}
        return grouped_matmul(x, w, group_sizes_E, alignment=BLOCK, backend=names[backend])

    def oracle(x: jax.Array, w: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        return run(x.astype(jnp.float32), w.astype(jnp.float32), group_sizes_E, backend="reference")
    return Case("grouped_matmul", f"E={groups} P={rows} N={n} K={k}", rows, draw, run, oracle, 2. * rows * n * k,
                "bf16", other_sizes, tuning.Key("product", rows, n, k, groups),
                rivals=rivals.of_even_bf16_groups(groups))


CASTS: dict[OperationName, Callable[..., Any]] = {
    "quantise": functools.partial(quantise, tile=(1, BLOCK)), "quantise_transposed": quantise_transposed,
    "quantise_both": quantise_both, "swiglu_quantise": swiglu_quantise}


def cast(name: OperationName, rows: int, width: int) -> Case:
    """bfloat16 to float8; `width` is that of the result."""
    taken, run = width * (2 if name == "swiglu_quantise" else 1), CASTS[name]

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        return (_uneven(key, rows, taken).astype(jnp.bfloat16),)
    oracle = functools.partial(run, backend="reference")
    return Case(name, f"M={rows} K={width}", rows, draw, run, oracle,
                rivals={"xla_plain": (Rival(lambda x: (x,), oracle),)})


def _as_float32(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return functools.partial(operation, dtype=jnp.float32, backend="reference")


def _uneven(key: jax.Array, *shape: int) -> jax.Array:
    """Normal numbers whose 1x128 tiles differ in magnitude, up to 64 times, so that no scale can stand for another."""
    values, powers = jax.random.split(key)
    power = jax.random.randint(powers, (*shape[:-1], -(-shape[-1] // BLOCK)), -3, 4)
    return jax.random.normal(values, shape) * jnp.repeat(jnp.exp2(power), BLOCK, axis=-1)[..., :shape[-1]]


def _in_rows(key: jax.Array, *shape: int) -> tuple[jax.Array, jax.Array]:
    return quantise(_uneven(key, *shape), (1, BLOCK), backend="reference")


def _in_blocks(key: jax.Array, *shape: int) -> tuple[jax.Array, jax.Array]:
    return quantise(_uneven(key, *shape), (BLOCK, BLOCK), backend="reference")
