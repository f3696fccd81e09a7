"""The oracle against facts worked out by hand, so that what agrees with the oracle agrees with the papers."""

import dataclasses
import math

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, RopeScaling
from tests import oracle

TIGHT = 1e-12
"""Rounding of float64 sums of O(1) terms."""

TINY = ModelConfig(
    vocab_size=23, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    num_nextn_predict_layers=2, rope_scaling=RopeScaling())
V3_ROPE = dataclasses.replace(TINY, qk_nope_head_dim=128, qk_rope_head_dim=64)


def variant(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def random_tokens(columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (2, columns))


def test_yarn_of_deepseek_v3():
    assert oracle.yarn_range(V3_ROPE) == (10, 23)
    plain = dataclasses.replace(V3_ROPE, rope_scaling=None)
    # The facts are given to ten digits.
    assert oracle.softmax_scale(V3_ROPE) == pytest.approx(0.1352337789, abs=5e-11)
    assert oracle.softmax_scale(plain) == pytest.approx(0.0721687836, abs=5e-11)
    base = oracle.rope_frequencies(plain)
    ratio = oracle.rope_frequencies(V3_ROPE) / base
    assert base[0] == 1
    assert base[16] == pytest.approx(0.01, rel=TIGHT)
    np.testing.assert_allclose(ratio[:11], 1, rtol=TIGHT)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=TIGHT)
    assert ratio[11] == pytest.approx(1 - 1 / 13 * 39 / 40, rel=TIGHT)


def test_yarn_magnitude_of_cos_and_sin():
    config = dataclasses.replace(V3_ROPE, rope_scaling=RopeScaling(factor=40, mscale=0.707, mscale_all_dim=1.0))
    x = np.random.default_rng(0).standard_normal((1, 64))
    expected = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    np.testing.assert_allclose(oracle.apply_rope(config, x, np.array([0])), expected * x, rtol=TIGHT)


def test_rope_turns_adjacent_pairs():
    config = variant(rope_scaling=None)
    turned = oracle.apply_rope(config, np.array([[1.0, 0.0, 0.0, 1.0]]), np.array([3]))
    expected = [[math.cos(3), math.sin(3), -math.sin(0.03), math.cos(0.03)]]
    np.testing.assert_allclose(turned, expected, atol=TIGHT)


@pytest.mark.parametrize("config", [V3_ROPE, dataclasses.replace(V3_ROPE, rope_scaling=None)])
def test_rope_depends_on_relative_position(config):
    query, key = np.random.default_rng(1).standard_normal((2, 1, 64))

    def product(at_query: int, at_key: int) -> float:
        return float(np.sum(oracle.apply_rope(config, query, np.array([at_query]))
                            * oracle.apply_rope(config, key, np.array([at_key]))))

    # Angles reach 1e3 radians, so cos and sin carry errors near 1e-13.
    assert product(7, 3) == pytest.approx(product(1004, 1000), abs=1e-10)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-3)


def test_attention_of_one_token_is_its_value():
    w, prefix = oracle.random_weights(TINY, 0), "layers.0.self_attn"
    x = np.random.default_rng(2).standard_normal((1, TINY.hidden_size))
    latent = (x @ w[f"{prefix}.kv_a_proj_with_mqa.weight"])[0, :TINY.kv_lora_rank]
    latent = latent / np.sqrt((latent**2).mean() + TINY.latent_norm_eps) * w[f"{prefix}.kv_a_layernorm.weight"]
    flat = latent @ w[f"{prefix}.kv_b_proj.weight"]
    values = np.concatenate([flat[6:11], flat[17:22]])
    np.testing.assert_allclose(oracle.mla(TINY, w, prefix, x)[0], values @ w[f"{prefix}.o_proj.weight"], atol=TIGHT)


def test_attention_of_two_tokens_by_hand():
    config = variant(num_attention_heads=1, q_lora_rank=None, kv_lora_rank=1, qk_nope_head_dim=2, qk_rope_head_dim=2,
                     v_head_dim=1, hidden_size=2, rope_scaling=None, rms_norm_eps=1e-30, latent_norm_eps=1e-30)
    w = {"a.q_proj.weight": np.array([[0.0, 0, 2, 0], [1, 0, 0, 0]]),
         "a.kv_a_proj_with_mqa.weight": np.array([[1.0, 1, 0], [-1, 0, 1]]),
         "a.kv_a_layernorm.weight": np.array([1.0]), "a.kv_b_proj.weight": np.array([[3.0, 0, 5]]),
         "a.o_proj.weight": np.array([[1.0, 2]])}
    # Token 0 = (1, 0): latent 1, key (3, 0 | 1, 0), value 5. Token 1 = (0, 1): latent -1, key (-3, 0 | R_1 (0, 1)),
    # value -5, query (1, 0 | 0, 0). So its logits are 3/2 and -3/2: value 5 tanh(3/2).
    output = oracle.mla(config, w, "a", np.eye(2))
    np.testing.assert_allclose(output, [[5, 10], [5 * math.tanh(1.5), 10 * math.tanh(1.5)]], rtol=TIGHT)
    # Token 1 = (-1, 0): value -5, rotary query (-2, 0) and key (-1, 0) at position 1, so its logits are
    # -2 cos(1) / 2 with token 0 and 2 / 2 with itself.
    mixed = 5 * math.tanh((-math.cos(1) - 1) / 2)
    output = oracle.mla(config, w, "a", np.array([[1.0, 0], [-1, 0]]))
    np.testing.assert_allclose(output, [[5, 10], [mixed, 2 * mixed]], rtol=TIGHT)


def random_scores(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.uniform(0.01, 0.99, (tokens, 8)), random.normal(0, 0.3, 8)


METHODS = [{"topk_method": "noaux_tc"}, {"topk_method": "group_limited_greedy"},
           {"topk_method": "greedy", "n_group": 1, "topk_group": 1}, {"masked_group_score": "0"}]


@pytest.mark.parametrize("changes", METHODS)
def test_router_weights(changes):
    config = variant(**changes)
    scores, bias = random_scores(50)
    indices, weights = oracle.route(config, scores, bias)
    assert indices.shape == weights.shape == (50, 3)
    assert (np.diff(indices, axis=1) > 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=TIGHT)
    plain = oracle.route(dataclasses.replace(config, norm_topk_prob=False), scores, bias)
    np.testing.assert_array_equal(plain[0], indices)
    np.testing.assert_allclose(plain[1], 2.5 * np.take_along_axis(scores, indices, axis=1), rtol=TIGHT)


@pytest.mark.parametrize("changes", METHODS[:2])
def test_group_limit(changes):
    indices, _ = oracle.route(variant(**changes), *random_scores(200))
    assert max(len(set(row // 2)) for row in indices) == 2
    free, _ = oracle.route(variant(topk_group=4, **changes), *random_scores(200))
    assert max(len(set(row // 2)) for row in free) == 3


def test_greedy_is_a_plain_top_k():
    config = variant(topk_method="greedy", n_group=1, topk_group=1)
    scores, bias = random_scores(50)
    np.testing.assert_array_equal(oracle.route(config, scores, bias)[0], np.sort(np.argsort(-scores)[:, :3]))


def test_group_rank_is_two_best_for_v3_and_one_for_v2():
    scores = np.array([[0.9, 0.1, 0.7, 0.6, 0.2, 0.2, 0.3, 0.3]])
    for method, expected in (("noaux_tc", [[2, 3]]), ("group_limited_greedy", [[0, 1]])):
        config = variant(topk_method=method, topk_group=1, num_experts_per_tok=2)
        np.testing.assert_array_equal(oracle.route(config, scores, np.zeros(8))[0], expected)


def test_bias_moves_the_choice_and_never_the_weight():
    config = variant(n_group=1, topk_group=1, num_experts_per_tok=2)
    scores = np.array([[0.8, 0.6, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1]])
    cases = [(np.zeros(8), [0, 1], [0.8 / 1.4, 0.6 / 1.4]),
             (np.array([0, -0.5, 0, 0, 0, 0, 0, 0]), [0, 2], [0.8 / 1.2, 0.4 / 1.2]),
             (np.array([0.1, 0, 0, 0, 0, 0, 0, 0]), [0, 1], [0.8 / 1.4, 0.6 / 1.4])]
    for bias, expected, shares in cases:
        indices, weights = oracle.route(config, scores, bias)
        np.testing.assert_array_equal(indices, [expected])
        np.testing.assert_allclose(weights, [2.5 * np.array(shares)], rtol=TIGHT)
    for method in METHODS[1:3]:
        unbiased = variant(**method)
        np.testing.assert_array_equal(oracle.route(unbiased, scores, cases[1][0])[0],
                                      oracle.route(unbiased, scores, np.zeros(8))[0])


def test_masks_differ_under_strongly_negative_bias():
    scores = np.array([[0.9, 0.5, 0.8, 0.4, 0.3, 0.3, 0.2, 0.2]])
    bias = np.array([0, -0.8, 0, -0.8, -0.2, -0.2, -0.2, -0.2])
    # Biased: (0.9 -0.3) (0.8 -0.4) (0.1 0.1) (0 0), sums 0.6, 0.4, 0.2, 0: groups 0 and 1 are kept.
    for mask, expected in (("-inf", [0, 1, 2, 3]), ("0", [0, 2, 4, 5])):
        config = variant(num_experts_per_tok=4, masked_group_score=mask)
        indices, weights = oracle.route(config, scores, bias)
        np.testing.assert_array_equal(indices, [expected])
        np.testing.assert_allclose(weights[0], 2.5 * scores[0, expected] / scores[0, expected].sum(), rtol=TIGHT)


@pytest.mark.parametrize("changes", METHODS)
def test_equal_scores_pick_the_lowest_indices(changes):
    indices, weights = oracle.route(variant(**changes), np.full((2, 8), 0.5), np.zeros(8))
    np.testing.assert_array_equal(indices, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights, 2.5 / 3, rtol=TIGHT)


def test_moe_by_hand():
    config = variant(hidden_size=2, moe_intermediate_size=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                     topk_group=1)
    ln3 = math.log(3)
    gate = np.array([[2 * ln3, -ln3, ln3, 0], [7, 7, 7, 7]])
    w = {"m.gate.weight": gate, "m.gate.e_score_correction_bias": np.zeros(4),
         "m.experts.gate_proj": np.full((4, 2, 1), ln3),
         "m.experts.up_proj": np.array([[[9.0], [9]], [[9], [9]], [[1], [9]], [[2], [9]]]),
         "m.experts.down_proj": np.array([[[0.0, 1]], [[1, 1]], [[2, 1]], [[3, 1]]]),
         "m.shared_experts.gate_proj.weight": np.array([[ln3], [4.0]]),
         "m.shared_experts.up_proj.weight": np.array([[1.0], [4]]),
         "m.shared_experts.down_proj.weight": np.array([[1.0, 1]])}
    # Scores 0.9, 0.25, 0.75, 0.5: group 1 wins (1.25 > 1.15) although expert 0 scores best; weights 1.5 and 1.
    # silu(ln 3) = 0.75 ln 3; output = that * (1.5 * 1 * [2, 1] + 1 * 2 * [3, 1] + [1, 1]).
    output = oracle.moe(config, w, "m", np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(output, [[10 * 0.75 * ln3, 4.5 * 0.75 * ln3]], rtol=TIGHT)


def test_sequence_balance_loss():
    config = variant(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    first = np.array([[0.8, 0.2], [0.6, 0.4]])  # f = (2, 0), P = (0.7, 0.3): 1.4
    second = np.array([[0.9, 0.1], [0.3, 0.9]])  # s' = (0.9, 0.1), (0.25, 0.75); f = (1, 1): 1
    assert oracle.sequence_balance_loss(config, np.stack([first, second])) == pytest.approx(1.2, rel=TIGHT)
    assert oracle.sequence_balance_loss(config, first[None] / 2) == pytest.approx(1.4, rel=TIGHT)


VARIANTS = [{}, {"q_lora_rank": None, "n_shared_experts": 0, "rope_scaling": None, "num_nextn_predict_layers": 0},
            {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
            {"mtp_hidden": "post_norm", "n_shared_experts": 2, "num_nextn_predict_layers": 1}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_forward_is_causal(changes):
    config, length = variant(**changes), 6
    depth = config.num_nextn_predict_layers
    weights, tokens = oracle.random_weights(config, 3), random_tokens(length + depth)
    before = [oracle.forward(config, weights, tokens)]
    for column in range(length + depth):
        changed = tokens.copy()
        changed[:, column] = (changed[:, column] + 1) % config.vocab_size
        after = oracle.forward(config, weights, changed)
        for k, (old, new) in enumerate(zip([before[0][0], *before[0][1]], [after[0], *after[1]], strict=True)):
            assert old.shape == (2, length, config.vocab_size)
            # Position i of depth k sees tokens 0 to i + k.
            first_to_see = max(column - k, 0)
            np.testing.assert_array_equal(old[:, :first_to_see], new[:, :first_to_see])
            if first_to_see < length:
                assert np.abs(old[:, first_to_see] - new[:, first_to_see]).max() > 1e-3


def test_block_adds_normed_attention_and_normed_feed_forward():
    w, x = oracle.random_weights(TINY, 8), np.random.default_rng(8).standard_normal((4, 16))

    def normed(values: np.ndarray, name: str) -> np.ndarray:
        return values / np.sqrt((values**2).mean(axis=1, keepdims=True) + TINY.rms_norm_eps) * w[f"{name}.weight"]

    between = x + oracle.mla(TINY, w, "layers.0.self_attn", normed(x, "layers.0.input_layernorm"))
    after = between + oracle.dense_ffn(w, "layers.0.mlp", normed(between, "layers.0.post_attention_layernorm"))
    np.testing.assert_allclose(oracle.block(TINY, w, "layers.0", x), after, atol=TIGHT)


def test_mtp_norms_both_inputs_and_puts_the_embedding_first():
    w = oracle.random_weights(TINY, 9)
    hidden, embedded = np.random.default_rng(9).standard_normal((2, 4, 16))
    output = oracle.mtp(TINY, w, "mtp.0", hidden, embedded)
    # Norms cancel a factor up to the epsilon of 1e-6.
    np.testing.assert_allclose(oracle.mtp(TINY, w, "mtp.0", 5 * hidden, 3 * embedded), output, rtol=1e-4, atol=1e-4)
    w["mtp.0.eh_proj.weight"][16:] = 0
    embedding_only = oracle.mtp(TINY, w, "mtp.0", hidden, embedded)
    np.testing.assert_array_equal(oracle.mtp(TINY, w, "mtp.0", hidden[::-1], embedded), embedding_only)
    assert np.abs(oracle.mtp(TINY, w, "mtp.0", hidden, embedded[::-1]) - embedding_only).max() > 1e-3


def test_mtp_reads_the_hidden_state_before_or_after_the_final_norm():
    weights, tokens = oracle.random_weights(TINY, 4), random_tokens(7)
    before = oracle.forward(variant(mtp_hidden="pre_norm"), weights, tokens)
    after = oracle.forward(variant(mtp_hidden="post_norm"), weights, tokens)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1][0] - after[1][0]).max() > 1e-3


def test_losses_of_uniform_and_of_copying_logits():
    weights, tokens = oracle.random_weights(TINY, 5), random_tokens(9)
    main, depths = oracle.losses(TINY, weights | {"lm_head.weight": np.zeros((16, 23))}, tokens)
    np.testing.assert_allclose([main, *depths], math.log(23), rtol=TIGHT)
    logits, depth_logits = oracle.forward(TINY, weights, tokens[:, :-1])
    main, depths = oracle.losses(TINY, weights, tokens)
    for k, (loss, values) in enumerate(zip([main, *depths], [logits, *depth_logits], strict=True)):
        chances = np.exp(values) / np.exp(values).sum(axis=-1, keepdims=True)
        expected = np.mean([-math.log(chances[b, i, tokens[b, i + k + 1]]) for b in range(2) for i in range(6)])
        assert loss == pytest.approx(expected, rel=TIGHT)


def test_random_weights():
    weights = oracle.random_weights(TINY, 6)
    assert all((value == oracle.random_weights(TINY, 6)[name]).all() for name, value in weights.items())
    assert all((value.astype(np.float32) == value).all() for value in weights.values())
    gains = np.concatenate([value for name, value in weights.items() if "norm" in name])
    assert (gains != 1).all()
    assert np.abs(gains - 1).max() < 0.6
    bias = weights["layers.1.mlp.gate.e_score_correction_bias"]
    assert (bias != 0).all()
    scores = oracle.router_scores(TINY, weights, "layers.1.mlp", np.random.default_rng(7).standard_normal((50, 16)))
    assert 0.1 < scores.std() < 0.4
    hidden, _ = oracle.forward(TINY, weights, random_tokens(10))
    assert 0.5 < hidden.std() < 2
