"""The generator: batches of unequal rows, seeds, stops, capacity, compilations, devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.inference.generate import Generator, rounded
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.mesh import make_mesh, shardings
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.weights import model_from_oracle

TINY = dataclasses.replace(MODELS["tiny"], num_hidden_layers=2, num_nextn_predict_layers=0)
GREEDY = Sampling(temperature=0)
PROMPTS = [np.array(p) for p in ([5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8], [200, 100])]


@functools.cache
def _weights():
    model = model_from_oracle(TINY, oracle.random_weights(TINY, seed=2))
    return model, *nnx.split(model, nnx.Param, RouterBias)[1:]


@functools.cache
def _generator(devices=1, **sizes):
    mesh = make_mesh(MeshConfig(**sizes) if sizes else MeshConfig(data=1), jax.devices()[:devices])
    generator = Generator(TINY, mesh, precision="float32")
    params, bias = (jax.device_put(x, shardings(x, mesh)) for x in _weights()[1:])
    return generator, generator.prepare(params, bias)


@functools.cache
def _last_logits():
    model = _weights()[0]
    return jax.jit(lambda tokens: model.logits(model(tokens, mtp=False).hidden_BTD))


def _forward_greedy(prompt, count):
    """The likeliest tokens by the training forward over the whole text each time."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 24), np.int32)
        padded[0, :len(ids)] = ids
        ids.append(int(np.argmax(_last_logits()(padded)[0, len(ids) - 1])))
    return ids[len(prompt):]


def _run(prompts, tokens, sampling, stop_ids=(), **mesh):
    generator, weights = _generator(**mesh)
    return generator.generate(weights, prompts, tokens, sampling, stop_ids).run()


def test_greedy_equals_the_whole_forward_pass_for_rows_of_different_lengths():
    assert _run(PROMPTS, 10, GREEDY) == [_forward_greedy(prompt, 10) for prompt in PROMPTS]


def test_a_row_does_not_depend_on_its_neighbours():
    """Same seed and prompt: same text, in any place, beside any other settings, and not with another seed."""
    kinds = [Sampling(seed=3), Sampling(0.7, top_k=20, seed=4), Sampling(2.0, top_p=0.9, min_p=0.01, seed=5),
             Sampling(repetition_penalty=1.5, seed=6)]
    together = _run(PROMPTS, 12, kinds)
    assert _run(PROMPTS[::-1], 12, kinds[::-1]) == together[::-1]
    assert _run([PROMPTS[2], *[PROMPTS[1]] * 3], 12, [kinds[2], *[GREEDY] * 3])[0] == together[2]
    other = _run(PROMPTS, 12, [dataclasses.replace(kind, seed=99) for kind in kinds])
    assert all(a != b for a, b in zip(other, together, strict=True))


def test_a_penalty_counts_prompt_and_answer():
    """So strong a penalty leaves no token twice."""
    for prompt, made in zip(PROMPTS, _run(PROMPTS, 20, Sampling(temperature=0, repetition_penalty=1e6)), strict=True):
        assert len({*prompt.tolist(), *made}) == len(prompt) + 20


def test_ids_stream_and_stop():
    generator, weights = _generator()
    free = generator.generate(weights, PROMPTS, 10, GREEDY).run()
    stop = free[0][4]
    generation = generator.generate(weights, PROMPTS, 10, GREEDY, stop_ids=[stop])
    steps = []
    for new in generation:
        steps.append(new)
        if len(steps) == 3:
            generation.finish(1)
    assert [[token for step in steps for token in step[row]] for row in range(4)] == generation.tokens
    for row, tokens in enumerate(generation.tokens):
        end = free[row].index(stop) + 1 if stop in free[row] else 10
        assert tokens == free[row][:min(end, 3) if row == 1 else end]
    assert generation.acceptance is None
    assert generation.tokens_per_step == 1


def test_one_program_for_each_rounded_size():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    generator = Generator(TINY, mesh, precision="float32")
    weights = generator.prepare(*_weights()[1:])
    for length, tokens in ((3, 5), (7, 2), (20, 12)):
        generator.generate(weights, [np.arange(length)] * 2, tokens, Sampling(length / 10, top_k=length)).run()
    assert generator.compilations() == (1, 1)
    generator.generate(weights, [np.arange(20)] * 2, 13, GREEDY).run()  # 33 tokens: a larger cache
    assert generator.compilations() == (2, 2)
    assert [rounded(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]


def test_what_does_not_fit_is_told_with_the_remedy():
    generator, weights = _generator()
    cases = [([np.arange(100)], 29, r"100 tokens and 29 .*\(model.max_position_embeddings\) is 128.* 99 tokens.* 28 "),
             ([np.array([], np.int32)], 5, "prompt 0 has no tokens"), ([], 5, "0 prompts"),
             (PROMPTS, 0, "0 new tokens"),
             ([np.array([1]), np.array([2, 320])], 5, "prompt 1 has token 320 outside model.vocab_size"),
             ([np.array([-1])], 5, "token -1 outside")]
    for prompts, tokens, message in cases:
        with pytest.raises(ConfigError, match=message):
            generator.generate(weights, prompts, tokens, GREEDY)
    with pytest.raises(ConfigError, match="4 prompts need as many samplings"):
        generator.generate(weights, PROMPTS, 5, [GREEDY] * 3)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        Generator(TINY, generator.mesh, speculative=True)
    [whole] = generator.generate(weights, [np.arange(100)], 28, GREEDY).run()
    assert len(whole) == 28


# Two nodes of four make the text of one device in the next test too.
@pytest.mark.parametrize("sizes", [pytest.param({"scale_out": 2, "scale_up": 4}, marks=pytest.mark.slow),
                                   {"data": 2, "scale_up": 2, "context": 2}], ids=str)
def test_eight_devices_make_the_text_of_one(sizes, eight_devices):
    """Five rows on eight devices; with a context axis, which decoding does not share."""
    prompts, kinds = [*PROMPTS, PROMPTS[0]], [*[GREEDY] * 4, Sampling(0.8, top_k=50, seed=11)]
    assert _run(prompts, 8, kinds, devices=8, **sizes) == _run(prompts, 8, kinds)


def test_weights_left_spread_make_the_same_text(eight_devices):
    mesh = make_mesh(MeshConfig(scale_out=2, scale_up=4))
    generator = Generator(TINY, mesh, precision="float32", spread=True)
    params, bias = (jax.device_put(x, shardings(x, mesh)) for x in _weights()[1:])
    weights = generator.prepare(params, bias)
    assert generator.generate(weights, PROMPTS, 4, GREEDY).run() == _run(PROMPTS, 4, GREEDY)
    whole = sum(x.size for x in jax.tree.leaves(weights))
    held = sum(x.addressable_data(0).size for x in jax.tree.leaves(weights))
    assert held < whole / 6
