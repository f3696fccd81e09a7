"""Paged caches with NaN wherever nothing is in use, and what attention to them gives, in NumPy float64."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.mla_decode import Attended, QuantizedPages, mla_decode
from pallas_kernels.mla_decode.reference import Pages
from pallas_kernels.targets import Backend

TYPES = {"bf16": ml_dtypes.bfloat16, "float32": np.float32, "float8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
LARGEST = {"float8": 448, "int8": 127}
SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of queries, and a cache of pages in any order."""

    lengths: tuple[int, ...]
    heads: int = 2
    queries: int = 1
    page: int = 64
    kind: str = "bf16"
    latent: int = 128
    rope: int = 64
    spare: int = 1
    """Pages that a row's table has beyond those in use."""
    first: tuple[int, ...] | None = None
    """Positions of first queries; None: the last query is that of the last entry."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(TYPES[self.kind if self.kind in ("bf16", "float32") else "bf16"])


@dataclasses.dataclass(frozen=True)
class Exact:
    """The result in float64."""

    out: np.ndarray
    lse: np.ndarray
    magnitude: np.ndarray
    """The sum of the magnitudes that `out` is a sum of: what roundings are relative to."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Operands of `mla_decode`, and what it should give."""

    query: np.ndarray
    pages: Pages
    table: np.ndarray
    exact: Exact
    of_rounded: Exact
    """The same where latents in 8 bits are rounded to bfloat16 before they are multiplied."""


def draw(case: Case, seed: int = 0) -> Drawn:
    """Scores of order one, so that many entries count."""
    rng = np.random.default_rng(seed)
    width, rows = case.latent + case.rope, len(case.lengths)
    query = rng.normal(size=(rows, case.queries, case.heads, width)).astype(case.dtype)
    used = [-(-length // case.page) for length in case.lengths]
    table = np.full((rows, max(used) + case.spare), -1, np.int32)
    order = iter(rng.permutation(sum(used) + 3))
    for row, count in enumerate(used):
        table[row, :count] = [next(order) for _ in range(count)]
    # Of what no table points to, and of entries that are not in use, the values are NaN (an integer has none).
    entries = np.full((sum(used) + 3, case.page, width), np.nan)
    for row, length in enumerate(case.lengths):
        for entry in range(length):
            entries[table[row, entry // case.page], entry % case.page] = rng.normal(size=width)
    # A table may point anywhere beyond its pages.
    table[table < 0] = rng.choice([-1, 10 ** 6, next(order)], size=(table < 0).sum())
    pages, values = _stored(case, entries)
    rounded = values.astype(np.float32).astype(case.dtype).astype(np.float64)
    return Drawn(query, pages, table, *(oracle(case, query.astype(np.float64), x, table) for x in (values, rounded)))


def _stored(case: Case, entries: np.ndarray) -> tuple[Pages, np.ndarray]:
    """As the cache has them, and the values that it then holds."""
    if case.kind in ("bf16", "float32"):
        stored = entries.astype(case.dtype)
        return jnp.asarray(stored), stored.astype(np.float64)
    latent, rope = np.split(entries, [case.latent], axis=-1)
    tiles = [latent[..., at:at + 128] for at in range(0, case.latent, 128)]
    scales = np.stack([np.abs(tile).max(axis=-1) / LARGEST[case.kind] for tile in tiles], axis=1).astype(np.float32)
    each = np.repeat(scales.astype(np.float64).swapaxes(1, 2), 128, axis=-1)[..., :case.latent]
    with np.errstate(invalid="ignore"):  # an integer has no NaN
        codes = (np.rint(latent / each) if case.kind == "int8" else latent / each).astype(TYPES[case.kind])
    stored = rope.astype(case.dtype)
    exact = np.concatenate([codes.astype(np.float64) * each, stored.astype(np.float64)], axis=-1)
    return QuantizedPages(*map(jnp.asarray, (codes, scales, stored))), exact


def oracle(case: Case, query: np.ndarray, entries: np.ndarray, table: np.ndarray) -> Exact:
    """Query by query, from the entries that it sees."""
    out, magnitude = np.zeros((2, *query.shape[:3], case.latent))
    lse = np.full(query.shape[:3], -np.inf)
    for row, length in enumerate(case.lengths):
        first = length - case.queries if case.first is None else case.first[row]
        for q in range(case.queries):
            count = max(0, min(first + q + 1, length))
            if count:
                seen = np.concatenate(entries[table[row, :-(-count // case.page)]])[:count]
                scores = SCALE * query[row, q] @ seen.T
                lse[row, q] = np.log(np.exp(scores).sum(axis=-1))
                weights = np.exp(scores - lse[row, q, :, None])
                out[row, q], magnitude[row, q] = (weights @ x[:, :case.latent] for x in (seen, np.abs(seen)))
    return Exact(out, lse, magnitude)


def attend(case: Case, drawn: Drawn, backend: Backend | None) -> Attended:
    """`mla_decode` of the case."""
    first = None if case.first is None else jnp.asarray(case.first, jnp.int32)
    return mla_decode(jnp.asarray(drawn.query), drawn.pages, jnp.asarray(drawn.table),
                      jnp.asarray(case.lengths, jnp.int32), first, latent=case.latent, scale=SCALE, backend=backend)


def check(case: Case, drawn: Drawn, got: Attended, want: Exact) -> None:
    """Within two roundings to bfloat16, of the weights (with a scale, if that is theirs) and of the result: 2^-8 each
    of the sum's magnitude, where the usual gate is 2^-6 of the result or 8e-4. Float32 sums add 1e-5."""
    assert got.out.dtype == case.dtype
    assert got.out.shape == want.out.shape
    limit = (1e-5 if case.kind == "float32" else 2 ** -7 + 1e-5) * want.magnitude
    np.testing.assert_array_less(np.abs(np.asarray(got.out, np.float64) - want.out), limit + 1e-30)
    assert got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)
