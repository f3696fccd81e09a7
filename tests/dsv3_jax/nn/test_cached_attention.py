"""Attention to cached latents, absorbed and projected, against each other and against what may not matter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import RopeScaling
from dsv3_jax.nn.attention import MultiHeadLatentAttention
from dsv3_jax.nn.cached_attention import absorbed_attention, projected_attention
from dsv3_jax.presets import MODELS

TINY = MODELS["tiny"]
CASES = {
    "v3": (TINY, 1),
    "several queries": (TINY, 3),
    "yarn, one head": (dataclasses.replace(TINY, num_attention_heads=1, rope_scaling=RopeScaling(
        factor=8.0, original_max_position_embeddings=16)), 2),
    "values wider than keys": (dataclasses.replace(TINY, v_head_dim=24, num_attention_heads=5), 2),
}
LENGTHS = np.array([12, 7, 3], np.int32)
CAPACITY = 12


def _case(config, queries, dtype=np.float32, seed=0):
    """A module, queries that end at each row's length, and entries, with NaN where the row has none."""
    rng = np.random.default_rng(seed)
    module = MultiHeadLatentAttention(dataclasses.replace(config, initializer_range=0.3), nnx.Rngs(0))
    heads, rows = config.num_attention_heads, len(LENGTHS)
    q_nope, q_rope = (jnp.asarray(rng.normal(size=(rows, queries, heads, width)), dtype)
                      for width in (config.qk_nope_head_dim, config.qk_rope_head_dim))
    entries = rng.normal(size=(rows, CAPACITY, config.kv_lora_rank + config.qk_rope_head_dim)).astype(np.float32)
    positions = LENGTHS[:, None] - queries + np.arange(queries, dtype=np.int32)
    nan = np.where(np.arange(CAPACITY)[None, :, None] < LENGTHS[:, None, None], entries, np.nan)
    return module, q_nope, q_rope, jnp.asarray(entries, dtype), jnp.asarray(nan, dtype), positions


@pytest.mark.parametrize(("config", "queries"), CASES.values(), ids=CASES.keys())
def test_absorbed_equals_projected_and_unused_entries_do_not_matter(config, queries):
    """Float32: the same products in another order, 1e-6 seen. What lies beyond a row's length changes no bit."""
    module, q_nope, q_rope, entries, nan, positions = _case(config, queries)
    out = {}
    for path in (absorbed_attention, projected_attention):
        out[path], clean = (path(module, q_nope, q_rope, x, positions, LENGTHS) for x in (nan, entries))
        np.testing.assert_array_equal(out[path], clean)
        assert out[path].shape == (*q_nope.shape[:3], config.v_head_dim)
    np.testing.assert_allclose(out[absorbed_attention], out[projected_attention], rtol=1e-4, atol=1e-5)


def test_a_query_sees_entries_up_to_its_own_and_no_further():
    module, q_nope, q_rope, entries, _, positions = _case(TINY, 3)
    changed = entries.at[0, 10].add(1.0)  # row 0 has queries at 9, 10 and 11
    before, after = (absorbed_attention(module, q_nope, q_rope, x, positions, LENGTHS) for x in (entries, changed))
    same = np.array((before == after).all(axis=(2, 3)))
    np.testing.assert_array_equal(same, [[True, False, False], [True] * 3, [True] * 3])


def test_an_empty_row_is_finite_and_its_neighbours_untouched():
    module, q_nope, q_rope, _, nan, positions = _case(TINY, 1)
    whole = absorbed_attention(module, q_nope, q_rope, nan, positions, LENGTHS)
    lengths = np.where(np.arange(3) == 1, 0, LENGTHS)
    out = absorbed_attention(module, q_nope, q_rope, nan, positions, lengths)
    np.testing.assert_array_equal(out[1], np.zeros_like(out[1]))
    np.testing.assert_array_equal(out[np.array([0, 2])], whole[np.array([0, 2])])


def test_bf16_stays_bf16_with_a_float32_softmax():
    """Within 2/128 of the float32 result, the bound of FlashMLA's own tests."""
    exact = absorbed_attention(*_arguments(_case(TINY, 2)))
    module, *arrays = _arguments(_case(TINY, 2, jnp.bfloat16))
    half = nnx.merge(nnx.graphdef(module), jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.state(module)))
    out = absorbed_attention(half, *arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2 / 128, atol=2 / 128 * np.abs(exact).max())


def _arguments(case):
    module, q_nope, q_rope, _, nan, positions = case
    return module, q_nope, q_rope, nan, positions, LENGTHS
