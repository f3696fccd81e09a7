"""Prefill and decode against the forward pass of training, in every order of doing them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, RopeScaling
from dsv3_jax.inference.cache import LatentCache, bytes_per_token
from dsv3_jax.inference.forward import Span, decode, predict_ahead, prefill, prefill_ahead, unstacked
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.weights import model_from_oracle

TINY = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2)
V2_STYLE = dataclasses.replace(
    TINY, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=4.0, n_group=1,
    topk_group=1, n_shared_experts=2, q_lora_rank=None, num_nextn_predict_layers=0,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16))
LONG_STACK = dataclasses.replace(TINY, num_hidden_layers=6, first_k_dense_replace=1, num_nextn_predict_layers=0)
SHORT = dataclasses.replace(TINY, num_nextn_predict_layers=0)
CONFIGS = {"v3": TINY, "v2, yarn, no query compression": V2_STYLE, "scanned stack": LONG_STACK,
           # Chunks of 4 in a ring of 3 or 5 entries, and prompts of 12.
           "latent, window": dataclasses.replace(SHORT, attention_window=3),
           "gqa": dataclasses.replace(SHORT, attention="gqa", num_attention_heads=4, num_key_value_heads=2,
                                      head_dim=12),
           "mqa, window": dataclasses.replace(SHORT, attention="mqa", head_dim=16, attention_window=5)}
LENGTH = 12
"""Of every prompt's array and every cache, so that few programs are compiled."""


@functools.cache
def _case(name):
    """A model, tokens [4, LENGTH] and the training forward's logits."""
    config = CONFIGS[name]
    model = model_from_oracle(config, oracle.random_weights(config, seed=1))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, LENGTH)).astype(np.int32)
    return config, model, tokens, np.asarray(jax.jit(_teacher)(model, tokens))


def _teacher(model, tokens):
    return model.logits(model(tokens, mtp=False).hidden_BTD)


@jax.jit
def _prefill(model, tokens, lengths, cache):
    out = prefill(model, tokens, lengths, cache)
    return model.logits(out.hidden_BQD), out.cache


@jax.jit
def _decode(model, tokens, cache, counts):
    out = decode(model, tokens, cache, counts)
    return model.logits(out.hidden_BQD), out.cache


def _close(got, want):
    """Float32 rounding through the layers, as against the oracle (tests/dsv3_jax/nn/test_model.py)."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def _nan_cache(config, rows=4):
    """Whatever is read before it is written shows."""
    cache = LatentCache.empty(config, rows, LENGTH, "float32")
    return dataclasses.replace(cache, storage=jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), cache.storage))


# The generator's layers are lists, and its text is compared with the forward pass in test_generate.py. What "gqa" and
# "latent, window" have is also in "mqa, window", and in rings of both kinds in test_storage.py.
@pytest.mark.parametrize(("name", "lists"), [
    *(pytest.param(name, False, marks=pytest.mark.slow if name in ("gqa", "latent, window") else [])
      for name in CONFIGS), pytest.param("v3", True, marks=pytest.mark.slow)])
def test_decode_equals_teacher_forcing_however_the_text_is_cut(name, lists):
    config, model, tokens, teacher = _case(name)
    model = unstacked(model) if lists else model
    whole, cache = _prefill(model, tokens, np.full(4, LENGTH, np.int32), _nan_cache(config))
    assert cache.capacity == (config.attention_window or LENGTH)
    _close(whole, teacher)
    np.testing.assert_array_equal(cache.lengths_B, [LENGTH] * 4)

    for widths in ((1,) * LENGTH, (4, 4, 4)):  # token by token, and in chunks
        cache, start, logits = _nan_cache(config), 0, []
        for width in widths:
            out, cache = _decode(model, tokens[:, start:start + width], cache, np.full(4, width, np.int32))
            logits.append(out)
            start += width
        _close(np.concatenate(logits, axis=1), teacher)


def test_rows_of_different_lengths_equal_single_rows():
    """Padding of a prompt, padding of a chunk and a row that waits: none of it reaches a real token."""
    config, model, tokens, teacher = _case("v3")
    lengths = np.array([5, 2, 8, 1], np.int32)
    padded = np.where(np.arange(LENGTH) < lengths[:, None], tokens, 7)
    logits, cache = _prefill(model, padded, lengths, _nan_cache(config))
    for row, length in enumerate(lengths):
        _close(logits[row, :length], teacher[row, :length])
    counts = np.array([3, 1, 0, 2], np.int32)
    step = np.stack([np.pad(tokens[row, length:length + count], (0, 4 - count))
                     for row, (length, count) in enumerate(zip(lengths, counts, strict=True))])
    logits, cache = _decode(model, step, cache, counts)
    np.testing.assert_array_equal(cache.lengths_B, lengths + counts)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        np.testing.assert_allclose(logits[row, :count], teacher[row, length:length + count], rtol=0,
                                   atol=1e-5 * np.abs(teacher).max())
    assert np.isfinite(logits).all()
    # Nothing was written beyond a row's tokens.
    written = np.isfinite(np.asarray(cache.storage.arrays_LBNx[0])).all(axis=-1)
    main = written[:config.num_hidden_layers]
    np.testing.assert_array_equal(main, np.broadcast_to(np.arange(LENGTH) < (lengths + counts)[:, None], main.shape))
    last, _ = _decode(model, tokens[np.arange(4), lengths + counts][:, None], cache, np.ones(4, np.int32))
    _close(last[:, 0], teacher[np.arange(4), lengths + counts])


def test_tokens_beyond_the_capacity_leave_the_others_alone():
    config, model, tokens, teacher = _case("v3")
    _, cache = _prefill(model, tokens, np.full(4, 10, np.int32), _nan_cache(config))
    logits, _ = _decode(model, np.pad(tokens[:, 10:], ((0, 0), (0, 2))), cache, np.full(4, 4, np.int32))
    _close(logits[:, :2], teacher[:, 10:])


def test_eight_devices_equal_one_and_the_cache_stays_where_its_rows_are(eight_devices):
    config, model, tokens, teacher = _case("v3")
    tokens, teacher = np.tile(tokens, (2, 1)), np.tile(teacher, (2, 1, 1))
    lengths = np.array([5, 2, 8, 1, 4, 6, 8, 3], np.int32)

    def run(model, tokens, lengths):
        cache = LatentCache.empty(config, 8, 16, "float32")
        first = prefill(model, tokens[:, :8], lengths, cache)
        at = jnp.take_along_axis(tokens, lengths[:, None] + jnp.arange(3), axis=1)
        return decode(model, at, first.cache)
    with jax.set_mesh(make_mesh(MeshConfig(scale_out=2, scale_up=4))):
        program = jax.jit(lambda *a: (lambda out: (model.logits(out.hidden_BQD), out.cache))(run(model, *a))).lower(
            tokens, lengths).compile()
        logits, cache = program(tokens, lengths)
    _close(logits, np.stack([teacher[row, n:n + 3] for row, n in enumerate(lengths)]))
    assert cache.storage.arrays_LBNx[0].sharding.shard_shape((3, 8, 16, 40)) == (3, 1, 16, 40)
    assert "f32[3,8,16,40]" not in program.as_text()


# Before the norm it is what speculative decoding is tested with.
@pytest.mark.parametrize("hidden", [pytest.param("pre_norm", marks=pytest.mark.slow), "post_norm"])
def test_prediction_modules_equal_training(hidden):
    """Two depths, prefilled up to `start` and then run over windows that overlap what is there."""
    config = dataclasses.replace(TINY, num_nextn_predict_layers=2, mtp_hidden=hidden)
    model = model_from_oracle(config, oracle.random_weights(config, seed=1))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH + 2)).astype(np.int32)
    start, window = 6, 3

    @jax.jit
    def read(model, tokens):
        cached = prefill(model, tokens[:, :LENGTH], jnp.full(2, LENGTH), _nan_cache(config, 2))
        prompt = dataclasses.replace(cached.cache, lengths_B=jnp.full(2, start))
        cache = prefill_ahead(model, cached.mtp_input_BQD[:, :start], tokens[:, :start], prompt)
        return model(tokens).mtp_hidden, cached.mtp_input_BQD, cache

    @jax.jit
    def ahead(model, hidden, tokens, first, cache):
        positions = jnp.broadcast_to(first + jnp.arange(window), (2, window))
        span, last = Span(positions, positions >= 0, jnp.full(2, first + window), fresh=False), []
        for k in (1, 2):
            hidden, cache = predict_ahead(model, k, hidden, tokens[:, k:k + window], span, cache)
            last.append(model.mtp[k - 1].norm(hidden)[:, -1])
        return last, cache
    want, mtp_input, cache = read(model, tokens)
    for first in range(start - window + 1, LENGTH - window + 1):
        got, cache = ahead(model, mtp_input[:, first:first + window], tokens[:, first:first + window + 2], first, cache)
        for k in (0, 1):
            _close(got[k], np.asarray(want[k][:, first + window - 1]))


def test_bytes_per_token_are_the_papers():
    """Paper 1, table 1: 70.272 KB; and 1,152 bytes more for the prediction module."""
    assert bytes_per_token(MODELS["deepseek_v3"], mtp=False) == 70_272
    assert bytes_per_token(MODELS["deepseek_v3"]) == 70_272 + 1_152
    cache = jax.eval_shape(lambda: LatentCache.empty(TINY, 3, 5, "float32"))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.storage))
    assert size == 3 * 5 * bytes_per_token(TINY, "float32")
