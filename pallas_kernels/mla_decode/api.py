"""Picks the backend of latent attention to a paged cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.reference import TILE, Attended, Pages, QuantizedPages
from pallas_kernels.targets import Backend, backend_module, dispatch


@functools.partial(jax.jit, static_argnames=("latent", "scale", "backend"), inline=True)
@jax.named_scope("mla_decode")
def mla_decode(query_BQHW: jax.Array, pages: Pages, table_BN: jax.Array, lengths_B: jax.Array,
               first_B: jax.Array | None = None, *, latent: int, scale: float,
               backend: Backend | None = None) -> Attended:
    """softmax(scale * q.e) e[:latent] over the entries e of each row, in the latent space (arXiv 2405.04434, section
    2.1.2: the key's projection is in the query, and the value's is applied to the result).

    Entries are read page by page, each once for up to 512 rows of queries on a TPU and for 64 on a Hopper card (others
    of the same row find them in L2). Pages that hold no entry in use are not read, so a table may point anywhere for
    them; what lies after the last entry of the last page may be anything, NaN too.

    Arithmetic floor: 1152 bytes an entry of DeepSeek-V3 in bfloat16, or 656 in 8 bits, over the memory's bandwidth; and
    2 Q H (576 + 512) FLOPs over the peak. 128 rows of 4096 entries with 128 heads take 180 us on an H100 by the first
    (3.35 TB/s) and 148 us by the second (989 TFLOP/s); with two queries a row, 295 us by the second.

    Args:
      query_BQHW: [B, Q, H, W]: the latent's part of `latent` values, then the rotated part.
      pages: [P, S, W] in the queries' dtype, or `QuantizedPages`. Entries may be wider than W; what follows is not
        used. To read one layer of a cache of several without a copy, give all layers' pages and a table that points to
        that layer's. On a TPU make entries 640 wide, or rotated keys 128 and pages of 128 entries: its memory takes
        whole lanes of 128 in any case, and narrower arrays XLA lays out otherwise where a program takes or returns
        them, and copies them for each call.
      table_BN: int32 [B, N], the pages of each row in order.
      lengths_B: int32 [B], entries in use, this step's own included; at most N * S. With 0 a row's results are zeros.
      first_B: int32 [B], the position of each row's first query, others follow: a query sees entries up to its own
        position, of those in use. None: the last query is that of the last entry.
      latent: C, the latent's width.
      scale: of the scores.
      backend: None picks by the platform that the program is compiled for: Hopper's or TPU's kernel where it serves,
        else the reference, which gathers all pages of the tables, and says so once.

    Returns:
      out [B, Q, H, C] in the queries' dtype, and the float32 logarithm of the sum of exponentials [B, Q, H], by which
      `merge` joins parts of a sequence. Scores, softmax and sums in float32; weights are rounded to the queries' dtype.

    Raises:
      ValueError: widths or types that do not belong together, or a problem that the named `backend` does not serve.
    """
    rows, queries, heads, width = query_BQHW.shape
    _check(pages, query_BQHW.dtype, width, latent)
    chex.assert_shape((table_BN, lengths_B), ((rows, None), (rows,)))
    values = pages.codes_PSC if isinstance(pages, QuantizedPages) else pages
    lengths_B = jnp.minimum(lengths_B, table_BN.shape[1] * values.shape[1])
    first_B = lengths_B - queries if first_B is None else first_B
    seen_BQ = jnp.clip(first_B[:, None] + jnp.arange(1, queries + 1), 0, lengths_B[:, None]).astype(jnp.int32)

    def run(name: Backend, *operands: jax.Array) -> Attended:
        return backend_module("mla_decode", name).attend(*operands, latent, scale)
    problem = Problem(queries * heads, latent, width - latent, values.shape[1], isinstance(pages, QuantizedPages),
                      query_BQHW.dtype.name, table_BN.size if values.shape[0] else 0)
    out_BRC, lse_BR = dispatch(run, problem, backend, query_BQHW.reshape(rows, queries * heads, width), pages,
                               table_BN.astype(jnp.int32), seen_BQ)
    return Attended(out_BRC.reshape(rows, queries, heads, latent), lse_BR.reshape(rows, queries, heads))


def _check(pages: Pages, dtype: jnp.dtype, width: int, latent: int) -> None:
    """Raises ValueError unless pages hold entries of `width` values, of which `latent` are the latent."""
    plain = pages.rope_PSR if isinstance(pages, QuantizedPages) else pages
    if plain.dtype != dtype:
        raise ValueError(f"what is not in 8 bits ({plain.dtype}) must have the queries' type ({dtype})")
    if not isinstance(pages, QuantizedPages):
        if pages.ndim != 3 or pages.shape[2] < width or not 0 < latent <= width:
            raise ValueError(f"pages {pages.shape} must be [P, S, {width} or more] as the queries are wide, of which "
                             f"the latent has {latent}")
        return
    (count, entries, codes), tiles = pages.codes_PSC.shape, -(-latent // TILE)
    if pages.codes_PSC.dtype not in (jnp.float8_e4m3fn, jnp.int8):
        raise ValueError(f"codes are float8_e4m3fn or int8, not {pages.codes_PSC.dtype}")
    if codes != latent or latent + pages.rope_PSR.shape[2] < width:
        raise ValueError(f"codes ({codes}) must be as wide as the latent ({latent}), and with the rotated keys "
                         f"({pages.rope_PSR.shape[2]}) as the queries ({width})")
    chex.assert_shape((pages.scales_PGS, pages.rope_PSR), ((count, tiles, entries), (count, entries, None)))


class Problem(NamedTuple):
    """What the choice of a backend depends on."""

    rows: int
    """Queries times heads."""
    latent: int
    rope: int
    page: int
    """Entries."""
    quantized: bool
    dtype: str
    table: int
    """Entries of the table of pages."""

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        return "" if backend == "reference" else backend_module("mla_decode", backend).misfit(self)
