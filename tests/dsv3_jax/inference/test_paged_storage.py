"""Pages hold what rows hold, and attention to them is attention to the same entries."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.attend import attend
from dsv3_jax.inference.cache import entry_format, entry_width
from dsv3_jax.inference.forward import Span
from dsv3_jax.inference.paged_attention import projects
from dsv3_jax.inference.paged_storage import PagedStorage
from dsv3_jax.inference.storage import RowStorage
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.block import make_attention
from dsv3_jax.presets import MODELS

TINY = dataclasses.replace(MODELS["tiny"], initializer_range=0.2)
NARROW = dataclasses.replace(TINY, qk_nope_head_dim=4, v_head_dim=4)
"""From five queries on by keys and values."""
ROWS, SIZE, PLACES = 3, 4, 5
TABLE = np.array([[7, 2, 9, 0, 4], [1, 6, 3, -1, -1], [5, 8, -1, -1, -1]], np.int32)
"""Of 11 pages, each in one row at most."""


def pages(kind, table=TABLE, count=11):
    """With NaN where floating-point numbers are kept."""
    storage = PagedStorage.empty(2, count, SIZE, entry_format(TINY, kind)).of_rows(jnp.asarray(table))
    return jax.tree.map(lambda x: jnp.full(x.shape, np.nan, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
                        storage)


@pytest.mark.parametrize("kind", ["float32", "bf16", "float8", "int8"])
def test_pages_hold_what_rows_hold(kind):
    """At positions of pages that the row has; -1, what is beyond them and places without a page nowhere."""
    rng = np.random.default_rng(0)
    positions = np.array([[0, 3, 4, 19, -1, 20], [11, 12, 2, 7, 8, -1], [5, 7, 8, 0, 15, 1]], np.int32)
    entries = jnp.asarray(rng.normal(size=(*positions.shape, entry_width(TINY))), jnp.float32)
    rows = RowStorage.empty((2, ROWS, PLACES * SIZE), entry_format(TINY, kind)).write(1, entries, positions)
    paged = pages(kind).write(1, entries, positions)
    has_page = np.repeat(TABLE >= 0, SIZE, axis=1)
    written = np.zeros(has_page.shape, bool)
    for row, own in enumerate(positions):
        written[row, own[(own >= 0) & (own < PLACES * SIZE)]] = True
    want, got = (np.asarray(storage.read(1, jnp.float32)) for storage in (rows, paged))
    np.testing.assert_array_equal(got[written & has_page], want[written & has_page])
    np.testing.assert_array_equal(paged.rounded(entries), rows.rounded(entries))
    untouched = np.asarray(pages(kind).write(0, entries, positions).read(1, jnp.float32))
    assert kind == "int8" or np.isnan(untouched).any(axis=-1).all(), "another layer"
    assert paged.capacity == rows.capacity == 20
    assert paged.page_bytes * 11 == sum(x.nbytes for x in paged.arrays_LPSx)


@pytest.mark.parametrize(("config", "kind", "queries"), [
    (TINY, "float32", 1), (TINY, "float32", 3), (TINY, "bf16", 2), (TINY, "float8", 1), (TINY, "int8", 3),
    (TINY, "float32", 11), (NARROW, "float32", 4), (NARROW, "float32", 11)], ids=[
        "one", "three", "bf16", "float8", "int8", "a chunk", "by latents", "by keys"])
def test_attention_to_pages_is_attention_to_rows(config, kind, queries):
    """Unused pages and slots are full of NaN. Float32 sums in another order; the same entries."""
    assert projects(config, queries) == (config is NARROW and queries == 11)
    attention = make_attention(config, nnx.Rngs(0))
    rng = np.random.default_rng(queries)
    before = np.array([9, 8, 0], np.int32)  # after them at most 20, 12 and 8 entries have pages
    counts = np.minimum(queries, np.array([11, 4, 8], np.int32))
    hidden = jnp.asarray(rng.normal(size=(ROWS, 9 + queries, TINY.hidden_size)), jnp.float32)

    @jax.jit
    def run(storage):
        column = np.arange(9)
        first = Span(jnp.broadcast_to(column, (ROWS, 9)), column < before[:, None], jnp.asarray(before), fresh=False)
        _, storage = attend(attention, hidden[:, :9], first, storage, 1)
        column = np.arange(queries)
        then = Span(before[:, None] + column, column < counts[:, None], jnp.asarray(before + counts), fresh=False)
        return attend(attention, hidden[:, 9:], then, storage, 1)[0]
    got = run(pages(kind))
    want = run(RowStorage.empty((2, ROWS, 20), entry_format(TINY, kind)))
    real = np.arange(queries) < counts[:, None]
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], rtol=0,
                               atol=2e-5 * np.abs(np.asarray(want)[real]).max())


@pytest.mark.parametrize("config", [TINY, NARROW], ids=["by latents", "by keys"])
def test_each_device_has_pages_and_rows_of_its_own(config, eight_devices):
    """Tables count from the device's first page; the same numbers as on one device with tables of its own."""
    attention = make_attention(config, nnx.Rngs(0))
    local = np.array([[1, 0], [0, 1], [1, -1], [0, 1]], np.int32)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, TINY.hidden_size)), jnp.float32)
    lengths = np.array([6, 6, 4, 5], np.int32)

    def run(storage):
        span = Span(jnp.broadcast_to(jnp.arange(6), (4, 6)), jnp.arange(6) < lengths[:, None], jnp.asarray(lengths),
                    fresh=False)
        return attend(attention, hidden, span, storage, 1)[0]
    with jax.set_mesh(make_mesh(MeshConfig(data=1, scale_out=2, scale_up=2), jax.devices()[:4])):
        got = jax.jit(run)(pages("float32", local, 8))
    whole = np.where(local >= 0, local + 2 * np.arange(4)[:, None], -1).astype(np.int32)
    want = run(pages("float32", whole, 8))
    real = np.arange(6) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], rtol=0, atol=1e-5)


def test_keys_and_values_are_cheaper_from_171_queries_on():
    """DeepSeek-V3: 262,144 FLOPs to project an entry for a head, 1,536 saved by each query."""
    v3 = MODELS["deepseek_v3"]
    assert [projects(v3, count) for count in (1, 170, 171, 4096)] == [False, False, True, True]
    assert pytest.approx(170.7, abs=0.1) == 2 * 512 * (128 + 128) / (2 * (2 * 512 + 64) - 2 * (128 + 64 + 128))
