"""Speculative decoding: the same greedy tokens, the same distribution, and drafts that are really the modules'."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference import generate
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import Sampling, probabilities, sampling_rows
from dsv3_jax.inference.speculative import Drafts, verify
from dsv3_jax.mesh import make_mesh, shardings
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.weights import model_from_oracle

TINY = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2)
TWO_DEPTHS = dataclasses.replace(TINY, num_nextn_predict_layers=2)
GREEDY = Sampling(temperature=0)
PROMPTS = [np.array(p) for p in ([5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8], [200, 100])]


def _agreeing(config, strength):
    """Weights whose layers add `strength` times what random ones do. At 0 the model sees a token's embedding alone, and
    so does every prediction module, of the token that it is given: drafts are perfect. In between some are right."""
    weights = oracle.random_weights(config, seed=3)
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] = weights[name] * strength
        if name.startswith("mtp.") and name.endswith("eh_proj.weight"):
            weights[name] = np.concatenate([np.eye(config.hidden_size), strength * weights[name][config.hidden_size:]])
        if name.startswith("mtp.") and name.count(".") == 3:
            weights[name] = weights["norm.weight"] if name.endswith(".norm.weight") else weights[name]
            weights[name] = np.ones_like(weights[name]) if name.endswith("enorm.weight") else weights[name]
    return weights


@functools.cache
def _generator(config, speculative, **sizes):
    mesh = make_mesh(MeshConfig(**sizes) if sizes else MeshConfig(data=1), jax.devices()[:8 if sizes else 1])
    return Generator(config, mesh, precision="float32", speculative=speculative)


def _prepared(generator, config, weights):
    model = model_from_oracle(config, weights)
    parts = (jax.device_put(x, shardings(x, generator.mesh)) for x in nnx.split(model, nnx.Param, RouterBias)[1:])
    return generator.prepare(*parts)


def _generation(config, weights, speculative, tokens, sampling=GREEDY, prompts=PROMPTS, **sizes):
    generator = _generator(config, speculative, **sizes)
    generation = generator.generate(_prepared(generator, config, weights), prompts, tokens, sampling)
    generation.run()
    return generation


def _expected(config, weights, prompt, text, tokens):
    """(drafts verified, drafts kept) on the way to `tokens` new ones, from the training forward pass over the text."""
    model = model_from_oracle(config, weights)
    ids = np.array([*prompt, *text])
    padded = np.zeros((1, 40), np.int32)
    padded[0, :len(ids)] = ids
    output = _forward(model, padded)
    guesses = [np.argmax(logits[0], axis=-1) for logits in output]
    known, drafted, kept = len(prompt), 0, 0  # t_0 .. t_known are known
    while known - len(prompt) + 1 < tokens:
        right = [guesses[k][known - 1] == ids[known + 1 + k] for k in range(len(guesses))]
        accepted = int(np.cumprod(right).sum())
        drafted, kept, known = drafted + len(right), kept + accepted, known + accepted + 1
    return drafted, kept


@jax.jit
def _forward(model, tokens):
    return [model.logits(hidden) for hidden in model(tokens).mtp_hidden]


@pytest.mark.parametrize(("config", "strength", "least", "most"), [
    (TINY, 1.0, 0.0, 0.2), (TINY, 0.15, 0.2, 0.95), (TWO_DEPTHS, 0.1, 0.2, 0.95),
    # Perfect drafts are also those of the test of acceptance, and post-norm that of test_forward.py.
    pytest.param(dataclasses.replace(TINY, mtp_hidden="post_norm"), 0.0, 1.0, 1.0, marks=pytest.mark.slow)],
    ids=["random", "one depth", "two depths", "perfect, post-norm"])
def test_greedy_tokens_are_the_plain_ones_and_drafts_the_modules_own(config, strength, least, most):
    """Drafts that are kept are those the training forward pass says: the prediction modules' caches are right, also
    where they had been written with a draft that was then rejected."""
    weights, tokens = _agreeing(config, strength), 20
    plain = _generation(config, weights, False, tokens + 5).tokens
    generation = _generation(config, weights, True, tokens)
    assert generation.tokens == [row[:tokens] for row in plain]
    expected = [_expected(config, weights, prompt, row, tokens) for prompt, row in zip(PROMPTS, plain, strict=True)]
    assert (generation.drafted, generation.accepted) == tuple(np.sum(expected, axis=0))
    assert least <= generation.acceptance <= most
    if strength == 0:
        assert generation.steps == 10  # the first token comes with the prompt, then two a step
        assert generation.tokens_per_step == pytest.approx(19 / 10)


def test_the_modules_caches_hold_what_the_whole_text_gives():
    """After steps that kept all, some and no drafts. Of the last K + 1 positions the next step writes entries anew."""
    generator, kept = _generator(TWO_DEPTHS, True), set()
    prepared = _prepared(generator, TWO_DEPTHS, _agreeing(TWO_DEPTHS, 0.1))
    rows = sampling_rows([GREEDY] * len(PROMPTS))
    state, first = generator._start(prepared, PROMPTS, 30, rows)
    texts = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, first, strict=True)]
    for _ in range(9):
        state, tokens, counts = generator._step(prepared, state, np.ones(len(PROMPTS), bool), rows)
        texts = [[*text, *new[:count]] for text, new, count in zip(texts, tokens, counts, strict=True)]
        kept |= set(counts.tolist())
    assert kept == {1, 2, 3}
    whole, _ = generator._start(prepared, [np.array(text) for text in texts], 1, rows)
    layers = slice(TWO_DEPTHS.num_hidden_layers, None)
    got, want = (np.asarray(s.cache.storage.arrays_LBNx[0][layers]) for s in (state, whole))
    for row, text in enumerate(texts):
        sure = len(text) - 1 - (TWO_DEPTHS.num_nextn_predict_layers + 1)
        # float32 sums in another order: prefill attends among the prompt, decoding to the cache by absorbed weights.
        np.testing.assert_allclose(got[:, row, :sure], want[:, row, :sure], rtol=0, atol=1e-5 * np.abs(want).max())


def test_acceptance_changes_with_the_prediction_weights_and_the_text_does_not():
    weights = _agreeing(TINY, 0.0)
    right = _generation(TINY, weights, True, 12)
    wrong = _generation(TINY, weights | {"mtp.0.eh_proj.weight": -weights["mtp.0.eh_proj.weight"]}, True, 12)
    assert right.tokens == wrong.tokens
    assert right.acceptance == 1
    assert wrong.acceptance < 0.2
    assert wrong.steps > 1.5 * right.steps


def test_eight_devices_speculate_as_one(eight_devices):
    weights = _agreeing(TINY, 0.15)
    one = _generation(TINY, weights, True, 10)
    eight = _generation(TINY, weights, True, 10, scale_out=2, scale_up=4)
    assert (eight.tokens, eight.accepted, eight.drafted) == (one.tokens, one.accepted, one.drafted)


def test_a_penalty_counts_drafts():
    """So strong a penalty leaves no token twice, though a step's drafts are not yet in the text when it is verified."""
    generation = _generation(TWO_DEPTHS, _agreeing(TWO_DEPTHS, 0.0), True, 20,
                             Sampling(temperature=0, repetition_penalty=1e6))
    for prompt, made in zip(PROMPTS, generation.tokens, strict=True):
        assert len({*prompt.tolist(), *made}) == len(prompt) + 20
    assert generation.acceptance > 0.9


SMALL = dataclasses.replace(TINY, vocab_size=6, num_hidden_layers=2, hidden_size=32, num_experts_per_tok=2)
FILTERED = Sampling(temperature=1.3, top_k=5, top_p=0.97, min_p=0.02, repetition_penalty=1.2)
ROWS = 4096


@jax.jit
def _probabilities(model, tokens, rows):
    """Of the tokens after the second, the third and the fourth one."""
    logits = model.logits(model(tokens, mtp=False).hidden_BTD)
    seen = tokens[:, :, None] == jnp.arange(SMALL.vocab_size)
    return [probabilities(logits[:, at], seen[:, :at + 1].any(axis=1), rows) for at in (1, 2, 3)]


@functools.cache
def _two_token_distribution(strength, sampling):
    """float64 [V, V]: the second and third new token after prompt [1, 2], through every first one."""
    model = model_from_oracle(SMALL, _agreeing(SMALL, strength))
    vocab = SMALL.vocab_size
    first, second = (x.reshape(-1) for x in np.meshgrid(np.arange(vocab), np.arange(vocab), indexing="ij"))
    tokens = np.stack([np.ones_like(first), np.full_like(first, 2), first, second], axis=1)
    rows = sampling_rows([sampling] * len(tokens))
    p = [np.asarray(part, np.float64) for part in _probabilities(model, tokens, rows)]
    joint = (p[0][np.arange(len(first)), first] * p[1][np.arange(len(first)), second])[:, None] * p[2]
    return joint.reshape(vocab, vocab, vocab).sum(axis=0)


@pytest.mark.parametrize(("strength", "sampling", "speculative", "acceptance"), [
    (1.0, FILTERED, False, None), (1.0, FILTERED, True, (0.02, 0.8)), (1.0, Sampling(), True, (0.02, 0.8)),
    (0.0, FILTERED, True, (0.995, 1))], ids=["plain", "poor draft", "poor draft, no filter", "perfect draft"])
def test_sampling_has_the_plain_distribution(strength, sampling, speculative, acceptance, monkeypatch):
    """Chi-square of 4,096 rows over the pairs of tokens, rare pairs pooled: above its 0.999 quantile once in 1000
    seeds, and the seeds are fixed."""
    monkeypatch.setattr(generate, "SMALLEST_SIZE", 4)
    generation = _generation(SMALL, _agreeing(SMALL, strength), speculative, 3, [
        dataclasses.replace(sampling, seed=seed) for seed in range(ROWS)], [np.array([1, 2])] * ROWS)
    made = np.array(generation.tokens)
    expected = ROWS * _two_token_distribution(strength, sampling).reshape(-1)
    counts = np.bincount(made[:, 1] * SMALL.vocab_size + made[:, 2], minlength=expected.size)
    assert _chi_square_is_low(counts, expected)
    # The bound has teeth: against one pair exchanged with another, the same counts fail.
    swapped = expected.copy()
    swapped[[expected.argmax(), expected.argmin()]] = swapped[[expected.argmin(), expected.argmax()]]
    assert not _chi_square_is_low(counts, swapped)
    if acceptance:
        assert acceptance[0] <= generation.acceptance <= acceptance[1]


def _chi_square_is_low(counts, expected):
    """Whether it is under the 0.999 quantile (by Wilson and Hilferty), cells that expect under 5 pooled."""
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() > 0 or counts[rare].sum() > 0:
        cells.append((np.array([counts[rare].sum()]), np.array([max(expected[rare].sum(), 1e-3)])))
    observed, wanted = (np.concatenate(part) for part in zip(*cells, strict=True))
    degrees = len(wanted) - 1
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    return ((observed - wanted) ** 2 / wanted).sum() < quantile


DISTRIBUTIONS = {
    "equal": ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0]),
    "near": ([0.5, 0.3, 0.2, 0.0], [0.4, 0.3, 0.1, 0.2]),
    "disjoint": ([0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),
    "certain draft": ([0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize(("p", "q"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_verification_gives_p_and_accepts_what_overlaps(p, q):
    """A first token distributed as p, and acceptance of sum(min(p, q)) within 4 standard deviations."""
    rows, rng = 20_000, np.random.default_rng(0)
    p, q = np.float32(p), np.float32(q)
    drafts = rng.choice(4, rows, p=q.astype(np.float64) / q.sum(dtype=np.float64)).astype(np.int32)
    after = np.eye(4, dtype=np.float32)[(drafts + 1) % 4]  # the token after a kept draft is certain
    verified = jax.jit(verify)(
        Drafts(drafts[:, None], np.broadcast_to(q, (rows, 1, 4))),
        np.stack([np.broadcast_to(p, (rows, 4)), after], axis=1), np.arange(rows, dtype=np.uint32),
        np.zeros(rows, np.int32))
    tokens, accepted = np.asarray(verified.tokens_BQ), np.asarray(verified.accepted_B)
    counts = np.bincount(tokens[:, 0], minlength=4)
    assert (counts[p == 0] == 0).all()
    assert _chi_square_is_low(counts[p > 0], rows * p[p > 0])
    overlap = np.minimum(p, q).sum(dtype=np.float64)
    assert abs(accepted.mean() - overlap) <= 4 * np.sqrt(max(overlap * (1 - overlap), 0) / rows) + 1e-6
    kept = accepted == 1
    np.testing.assert_array_equal(tokens[kept, 0], drafts[kept])
    np.testing.assert_array_equal(tokens[kept, 1], (drafts[kept] + 1) % 4)
