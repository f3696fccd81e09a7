"""Every filter against a few lines of NumPy, and draws that depend on their row alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import DRAFT, TARGET, Sampling, draw, probabilities, sampling_rows, uniform

VOCAB = 11
_probabilities = jax.jit(probabilities)


def _softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def _oracle(logits, seen, s):
    """One row, in float64, filter by filter, each on what the last one left."""
    x = logits.astype(np.float64).copy()
    for token in np.flatnonzero(seen):
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    if s.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x /= s.temperature
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    kept = order[:s.top_k] if s.top_k else order
    total, survivors = 0.0, []
    for token, p in zip(kept, _softmax(x[kept]), strict=True):
        if total >= s.top_p and s.top_p < 1:
            break
        survivors.append(token)
        total += p
    p = _softmax(x[survivors])
    survivors = [token for token, each in zip(survivors, p, strict=True) if each >= s.min_p * p.max()]
    out = np.zeros(len(x))
    out[survivors] = _softmax(x[survivors])
    return out


SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0),
    "greedy with a penalty": Sampling(temperature=0, repetition_penalty=3.0),
    "cold": Sampling(temperature=0.3),
    "hot": Sampling(temperature=4.0),
    "almost greedy": Sampling(temperature=1e-30),
    "top-k 1": Sampling(top_k=1),
    "top-k 4": Sampling(top_k=4),
    "top-k beyond the vocabulary": Sampling(top_k=1000),
    "top-p": Sampling(top_p=0.7),
    "top-p of one token": Sampling(top_p=1e-6),
    "min-p": Sampling(min_p=0.2),
    "min-p 1": Sampling(min_p=1.0),
    "penalty": Sampling(repetition_penalty=1.7),
    "reward": Sampling(repetition_penalty=0.6),
    "all": Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    "top-k then top-p": Sampling(top_k=3, top_p=0.75),
}


def _rows(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (len(SAMPLINGS), VOCAB)).astype(np.float32)
    return logits, rng.random(logits.shape) < 0.4


@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_the_oracle(seed):
    """One program for rows of every kind. Float32 against float64: 1e-5 relative."""
    logits, seen = _rows(seed)
    compiled = _probabilities._cache_size()
    got = np.asarray(_probabilities(logits, seen, sampling_rows(list(SAMPLINGS.values()))))
    assert _probabilities._cache_size() <= compiled + 1
    for index, (name, sampling) in enumerate(SAMPLINGS.items()):
        want = _oracle(logits[index], seen[index], sampling)
        np.testing.assert_array_equal(got[index] > 0, want > 0, err_msg=name)
        np.testing.assert_allclose(got[index], want, rtol=1e-5, atol=1e-7, err_msg=name)


def test_top_k_comes_before_top_p_and_top_p_before_min_p():
    """Probabilities 0.4, 0.3, 0.2, 0.1. Top-p 0.5 keeps two, but one after top-k 2, when the first holds 4/7."""
    logits, seen = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]])), np.zeros((1, 4), bool)
    for sampling, kept in ((Sampling(top_p=0.5), 2), (Sampling(top_k=2, top_p=0.5), 1),
                           (Sampling(top_k=2, top_p=0.6), 2), (Sampling(top_k=2, top_p=0.6, min_p=0.8), 1)):
        p = _probabilities(logits, seen, sampling_rows([sampling]))
        assert (np.asarray(p) > 0).sum() == kept, sampling


def test_ties_go_to_the_lowest_ids():
    logits, seen = np.zeros((3, VOCAB), np.float32), np.zeros((3, VOCAB), bool)
    p = np.asarray(_probabilities(logits, seen, sampling_rows(
        [Sampling(temperature=0), Sampling(top_k=3), Sampling(top_p=0.3)])))
    assert [np.flatnonzero(row).tolist() for row in p] == [[0], [0, 1, 2], [0, 1, 2, 3]]


def test_draws_depend_on_seed_position_and_use_alone():
    p = np.random.default_rng(0).dirichlet(np.ones(VOCAB), 64).astype(np.float32)
    p[:] = p[0]
    seeds, positions = np.arange(64, dtype=np.uint32), np.full(64, 5, np.int32)
    all_rows = np.asarray(draw(p, seeds, positions, TARGET))
    np.testing.assert_array_equal(draw(p[:3], seeds[[9, 3, 60]], positions[:3], TARGET), all_rows[[9, 3, 60]])
    for other in (draw(p, seeds, positions + 1, TARGET), draw(p, seeds + 64, positions, TARGET),
                  draw(p, seeds, positions, DRAFT)):
        assert (np.asarray(other) != all_rows).any()
    u = np.asarray(uniform(seeds, positions, TARGET))
    assert len(set(u.tolist())) == 64


def test_draws_follow_the_probabilities():
    """Chi-square of 20,000 draws over 10 tokens with 9 degrees of freedom: above 27.9 once in 1000 seeds; the seeds are
    fixed. A token of probability 0 never comes."""
    p = np.append(np.random.default_rng(1).dirichlet(np.ones(10)), 0.0)
    n = 20_000
    drawn = np.asarray(jax.jit(draw, static_argnums=3)(np.broadcast_to(p.astype(np.float32), (n, 11)),
                                                       np.arange(n, dtype=np.uint32), np.zeros(n, np.int32), TARGET))
    counts = np.bincount(drawn, minlength=11)
    assert counts[10] == 0
    assert ((counts[:10] - n * p[:10]) ** 2 / (n * p[:10])).sum() < 27.9


@pytest.mark.parametrize(("field", "value"), [("temperature", -1), ("top_k", -1), ("top_k", 2 ** 31),
                                              ("top_p", 0), ("top_p", 1.5), ("min_p", 2),
                                              ("repetition_penalty", 0), ("seed", -1)])
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"sampling.{field} \({value}\)"):
        Sampling(**{field: value})
