"""What caches keep: bytes, bounds of their errors, and rings against caches that keep everything."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.attend import attend
from dsv3_jax.inference.cache import LatentCache, bytes_per_token, cached_entries, entry_layout
from dsv3_jax.inference.entry_format import EightBitFormat, EntryLayout, dequantize, quantize
from dsv3_jax.inference.forward import Span
from dsv3_jax.inference.storage import RowStorage
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.block import make_attention
from dsv3_jax.nn.cached_attention import absorbed_attention
from dsv3_jax.nn.grouped_query_attention import cached_grouped_attention
from dsv3_jax.presets import MODELS

V3 = MODELS["deepseek_v3"]
TINY = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2, initializer_range=0.2)
CONFIGS = {"mla": TINY, "gqa": dataclasses.replace(TINY, attention="gqa", num_attention_heads=4, num_key_value_heads=2,
                                                   head_dim=8)}
WINDOW, TOKENS, ROWS = 4, 11, 8


def _bytes(config, rows, tokens, kind, mtp=False):
    storage = jax.eval_shape(lambda: LatentCache.empty(config, rows, tokens, kind, mtp)).storage
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(storage))


@pytest.mark.parametrize(("config", "kind", "entry"), [
    (V3, "bf16", 2 * 576), (V3, "float8", 512 + 4 * 4 + 64 * 2), (V3, "int8", 656), (V3, "float32", 4 * 576),
    (dataclasses.replace(V3, attention="gqa", num_key_value_heads=8), "bf16", 2 * 2 * 8 * 128),
    (dataclasses.replace(V3, attention="gqa", num_key_value_heads=8), "float8", 2 * 8 * (128 + 4)),
    (dataclasses.replace(V3, attention="mqa"), "int8", 2 * (128 + 4)),
    (MODELS["quickstart"], "int8", 48 + 4 + 2 * 16),
])
def test_bytes_of_an_entry_by_hand(config, kind, entry):
    """656 bytes is DeepSeek-V3.2's layout: 512 float8, 4 float32 scales, 64 bf16."""
    assert _bytes(config, 3, 5, kind) == 3 * 5 * config.num_hidden_layers * entry
    assert bytes_per_token(config, kind, mtp=False) == config.num_hidden_layers * entry


def test_a_window_is_all_that_is_allocated():
    """And K entries more for K prediction modules."""
    config = dataclasses.replace(V3, attention_window=128)
    assert _bytes(config, 3, 4096, "bf16") == 3 * 128 * 70_272
    assert cached_entries(config, 4096) == 129
    assert cached_entries(config, 100, mtp=False) == 100


@pytest.mark.parametrize("width", [128, 300, 48])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_quantization_stays_within_the_step_of_its_format(kind, width):
    """Half a step: 2^-4 of a float8 value or 2^-10 of its scale, 2^-1 of an int8's; and float32 rounding of the
    product. Tiles differ by 2^20, so no tile may use another's scale."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, width)) * 2.0 ** (10 * (np.arange(width) // 128)) * 2.0 ** (4 * np.arange(6)[:, None])
    x[1, :20] = 0
    x[2] = 0
    x = x.astype(np.float32)
    dtype = jnp.dtype({"float8": jnp.float8_e4m3fn, "int8": jnp.int8}[kind])
    codes, scales = quantize(jnp.asarray(x), dtype)
    assert (codes.dtype, codes.shape, scales.shape) == (dtype, x.shape, (6, -(-width // 128)))
    each = np.repeat(np.asarray(scales), 128, axis=-1)[:, :width]
    step = np.maximum(np.abs(x) / 16, each * 2.0 ** -10) if kind == "float8" else each / 2
    error = np.abs(np.asarray(dequantize(codes, scales, jnp.float32)) - x)
    assert (error <= step + 1e-6 * np.abs(x)).all()
    assert error[x == 0].max() == 0
    assert error.max() > 0.3 * step[error == error.max()].min(), "exact: nothing was quantized"
    greatest = np.abs(np.pad(x, ((0, 0), (0, -width % 128))).reshape(6, -1, 128)).max(axis=-1)
    np.testing.assert_allclose(scales, np.maximum(greatest, 1e-30) / {"float8": 448, "int8": 127}[kind], rtol=1e-6)


def test_entries_lie_where_they_were_written():
    """In parts, at their positions of their layer; -1 and what is beyond the end nowhere. The rest stays in bf16."""
    storage = RowStorage.empty((2, 2, 4), EightBitFormat(EntryLayout((130, 20), 6), jnp.dtype(jnp.int8)))
    entries = np.random.default_rng(0).normal(size=(2, 3, 156)).astype(np.float32)
    after = storage.write(1, jnp.asarray(entries), jnp.array([[3, -1, 0], [4, 2, 1]]))
    got, rounded = after.read(1, jnp.float32), after.rounded(jnp.asarray(entries))
    want = np.zeros((2, 4, 156), np.float32)
    for row, token, position in ((0, 0, 3), (0, 2, 0), (1, 1, 2), (1, 2, 1)):
        want[row, position] = rounded[row, token]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rounded[..., 150:], entries[..., 150:].astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(rounded[..., :150], entries[..., :150], atol=np.abs(entries).max() / 253)
    assert not np.asarray(after.read(0, jnp.float32)).any()


def _empty(config, kind, entries):
    """One of `entries` a row whatever the window, with NaN where floating-point numbers are kept."""
    whole = dataclasses.replace(config, attention_window=None)
    storage = LatentCache.empty(whole, ROWS, entries, kind, mtp=False).storage
    return jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype) if x.dtype != jnp.int8 else x, storage)


@jax.jit
def _step(attention, hidden, positions, lengths, storage):
    return attend(attention, hidden, Span(positions, positions < lengths[:, None], lengths, fresh=False), storage, 1)


def _run(attention, hidden, storage, widths):
    """Decodes `hidden` in chunks: rows of odd number have their last chunk padded by one token."""
    outs, start = [], 0
    for width in widths:
        positions = np.broadcast_to(start + np.arange(width, dtype=np.int32), (ROWS, width))
        lengths = np.full(ROWS, start + width, np.int32)
        if start + width == TOKENS:
            lengths -= np.arange(ROWS, dtype=np.int32) % 2
        out, storage = _step(attention, hidden[:, start:start + width], positions, lengths, storage)
        outs.append(out)
        start += width
    return jnp.concatenate(outs, axis=1), storage


def _case(name):
    config = dataclasses.replace(CONFIGS[name], attention_window=WINDOW)
    hidden = np.random.default_rng(0).normal(size=(ROWS, TOKENS, config.hidden_size)).astype(np.float32)
    return config, make_attention(config, nnx.Rngs(0)), hidden


@pytest.mark.parametrize(("name", "kind"), [  # int8 differs from float8 in `quantize` alone
    ("mla", "float8"), ("gqa", "float32"), pytest.param("mla", "float32", marks=pytest.mark.slow),
    pytest.param("gqa", "float8", marks=pytest.mark.slow)])
def test_a_ring_equals_a_cache_that_keeps_everything(name, kind):
    """Float32 sums in another order, of the same stored values; however the tokens are cut into chunks."""
    config, attention, hidden = _case(name)
    want, _ = _run(attention, hidden, _empty(config, kind, TOKENS), (TOKENS,))
    real = np.arange(TOKENS) < TOKENS - (np.arange(ROWS) % 2)[:, None]
    for widths in ((1,) * TOKENS, (5, 2, 2, 2)):
        got, storage = _run(attention, hidden, _empty(config, kind, WINDOW), widths)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5 * np.abs(want[real]).max())
        assert storage.capacity == WINDOW


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_to_quantized_entries_is_exact_attention_to_rounded_ones(name):
    """So its error is that of `quantize`, whose bound is tested above, and of nothing else."""
    config, attention, hidden = _case(name)
    config = dataclasses.replace(config, attention_window=None)
    attention = make_attention(config, nnx.Rngs(0))
    rounded = _empty(config, "float8", TOKENS)
    plain, kept = _run(attention, hidden, _empty(config, "float32", TOKENS), (TOKENS,))
    got, _ = _run(attention, hidden, rounded, (TOKENS,))
    entries = rounded.rounded(jnp.nan_to_num(kept.arrays_LBNx[0][1]))
    positions, lengths = np.broadcast_to(np.arange(TOKENS), (ROWS, TOKENS)), TOKENS - np.arange(ROWS) % 2
    if name == "mla":
        want = absorbed_attention(attention, *attention.query(hidden, positions), entries, positions, lengths)
    else:
        want = cached_grouped_attention(config, attention.query(hidden, positions), entries, positions, lengths)
    real = positions < lengths[:, None]
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5 * np.abs(want[real]).max())
    assert np.abs(plain - got)[real].max() > 1e-3 * np.abs(plain[real]).max(), "nothing was rounded"


def test_eight_devices_equal_one_with_a_ring_in_eight_bits(eight_devices):
    config, attention, hidden = _case("gqa")
    want, _ = _run(attention, hidden, _empty(config, "float8", WINDOW), (5, 6))
    with jax.set_mesh(make_mesh(MeshConfig(scale_out=2, scale_up=4))):
        got, storage = jax.jit(lambda m, x: _run(m, x, _empty(config, "float8", WINDOW), (5, 6)))(attention, hidden)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for x in jax.tree.leaves(storage):
        assert x.sharding.shard_shape(x.shape)[1] == 1
    assert entry_layout(config).width == storage.arrays_LBNx[0].shape[-1]
