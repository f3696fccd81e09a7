"""DeepSeek-V3 in plain NumPy float64, written from the papers' equations and from nothing else.

The oracle of the JAX modules: slow, explicit, and free of their code. It loops over sequences, heads, queries, tokens
and experts. "Paper 2" is arXiv 2412.19437 (the DeepSeek-V3 technical report), "V2" is arXiv 2405.04434.

Weights are a flat dict of [in, out] matrices under the published names (see `weight_shapes`). Suffixes of names: B
sequences, T tokens, D hidden, E routed experts, K experts per token, V vocabulary, R rotated dimensions, C latent.
"""

import math

import numpy as np

from dsv3_jax.config import ModelConfig

Weights = dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * gain


def yarn_magnitude(factor: float, mscale: float) -> float:
    """sqrt(t) = 0.1 mscale ln(s) + 1, and 1 where nothing is extended (paper 2, section 4.3)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotated_width(config: ModelConfig) -> int:
    """MLA rotates a part of its own of each head, the others rotate the head."""
    return config.qk_rope_head_dim if config.attention == "mla" else config.head_dim


def yarn_range(config: ModelConfig) -> tuple[int, int]:
    """Indices of the frequency pairs between which YaRN ramps from kept (low) to interpolated (high)."""
    scaling, width = config.rope_scaling, rotated_width(config)
    length = scaling.original_max_position_embeddings
    # Pair i turns n = theta^(-2i/width) * length / (2 pi) times in the original context; solved for i.
    fast, slow = (width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                  for turns in (scaling.beta_fast, scaling.beta_slow))
    return max(math.floor(fast), 0), min(math.ceil(slow), width - 1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, [R/2]: theta^(-2i/R), slowed down by YaRN where `rope_scaling` is set."""
    width = rotated_width(config)
    frequencies = [config.rope_theta ** (-2.0 * i / width) for i in range(width // 2)]
    if config.rope_scaling is None:
        return np.array(frequencies)
    low, high = yarn_range(config)
    span = (high - low) or 0.001
    ramps = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
    return np.array([base / config.rope_scaling.factor * ramp + base * (1.0 - ramp)
                     for base, ramp in zip(frequencies, ramps, strict=True)])


def apply_rope(config: ModelConfig, x_TR: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
    """Rotates adjacent pairs (2i, 2i+1) by position * frequency_i (paper 2, equations 3 and 8)."""
    factor = 1.0
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        factor = yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    angles = np.asarray(positions_T)[:, None] * rope_frequencies(config)[None, :]
    even, odd = x_TR[:, 0::2], x_TR[:, 1::2]
    rotated = np.empty_like(x_TR)
    rotated[:, 0::2] = factor * (even * np.cos(angles) - odd * np.sin(angles))
    rotated[:, 1::2] = factor * (even * np.sin(angles) + odd * np.cos(angles))
    return rotated


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(d_h + d_h^R) (paper 2, equation 10), times YaRN's temperature wherever `rope_scaling` is set."""
    width = config.qk_nope_head_dim + config.qk_rope_head_dim if config.attention == "mla" else config.head_dim
    scale = 1.0 / math.sqrt(width)
    if config.rope_scaling is not None:
        scale *= yarn_magnitude(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def mla(config: ModelConfig, w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence (paper 2, equations 1 to 11); `prefix` is e.g. "layers.0.self_attn"."""
    tokens, nope, v_dim = len(x_TD), config.qk_nope_head_dim, config.v_head_dim
    positions_T = np.arange(tokens)
    compressed = x_TD @ w[f"{prefix}.kv_a_proj_with_mqa.weight"]
    latent_TC = rms_norm(compressed[:, :config.kv_lora_rank], w[f"{prefix}.kv_a_layernorm.weight"],
                         config.latent_norm_eps)
    shared_key_TR = apply_rope(config, compressed[:, config.kv_lora_rank:], positions_T)
    keys_values = (latent_TC @ w[f"{prefix}.kv_b_proj.weight"]).reshape(tokens, -1, nope + v_dim)
    if config.q_lora_rank is None:
        query = x_TD @ w[f"{prefix}.q_proj.weight"]
    else:
        latent = rms_norm(x_TD @ w[f"{prefix}.q_a_proj.weight"], w[f"{prefix}.q_a_layernorm.weight"],
                          config.latent_norm_eps)
        query = latent @ w[f"{prefix}.q_b_proj.weight"]
    query = query.reshape(tokens, config.num_attention_heads, -1)
    heads = []
    for head in range(config.num_attention_heads):
        query_rope_TR = apply_rope(config, query[:, head, nope:], positions_T)
        output = np.zeros((tokens, v_dim))
        for t in range(tokens):
            seen = seen_from(config, t)
            logits = keys_values[seen, head, :nope] @ query[t, head, :nope] + shared_key_TR[seen] @ query_rope_TR[t]
            output[t] = softmax(logits * softmax_scale(config)) @ keys_values[seen, head, nope:]
        heads.append(output)
    return np.concatenate(heads, axis=-1) @ w[f"{prefix}.o_proj.weight"]


def seen_from(config: ModelConfig, t: int) -> slice:
    """The positions that token t attends to."""
    return slice(0 if config.attention_window is None else max(0, t - config.attention_window + 1), t + 1)


def gqa(config: ModelConfig, w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence whose query heads share keys and values in equal groups (arXiv 2305.13245)."""
    shared = 1 if config.attention == "mqa" else config.num_key_value_heads
    tokens, width = len(x_TD), config.head_dim
    query, key, value = ((x_TD @ w[f"{prefix}.{name}_proj.weight"]).reshape(tokens, -1, width) for name in "qkv")
    heads = []
    for head in range(config.num_attention_heads):
        group = head * shared // config.num_attention_heads
        query_TA, key_TA = (apply_rope(config, x, np.arange(tokens)) for x in (query[:, head], key[:, group]))
        output = np.zeros((tokens, width))
        for t in range(tokens):
            seen = seen_from(config, t)
            output[t] = softmax(key_TA[seen] @ query_TA[t] * softmax_scale(config)) @ value[seen, group]
        heads.append(output)
    return np.concatenate(heads, axis=-1) @ w[f"{prefix}.o_proj.weight"]


def best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` greatest values, greatest first; the lowest index wins a tie."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose_experts(config: ModelConfig, scores_E: np.ndarray, bias_E: np.ndarray) -> list[int]:
    """The experts of one token, ascending (paper 2, equation 16 and the node limit; V2, section 2.2.2 without bias)."""
    biased = config.topk_method == "noaux_tc"
    ranked = [float(score + bias) if biased else float(score) for score, bias in zip(scores_E, bias_E, strict=True)]
    if config.topk_method != "greedy":
        size = config.n_routed_experts // config.n_group
        groups = [sorted(ranked[g * size:(g + 1) * size], reverse=True) for g in range(config.n_group)]
        counted = 2 if biased else 1
        kept = best([sum(group[:counted]) for group in groups], config.topk_group)
        outside = -math.inf if config.masked_group_score == "-inf" else 0.0
        ranked = [score if expert // size in kept else outside for expert, score in enumerate(ranked)]
    return sorted(best(ranked, config.num_experts_per_tok))


def route(config: ModelConfig, scores_TE: np.ndarray, bias_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts [T, K], ascending, and their weights [T, K] from the unbiased scores (paper 2, equations 13 and 16)."""
    indices, weights = [], []
    for scores_E in scores_TE:
        chosen = choose_experts(config, scores_E, bias_E)
        gates = scores_E[chosen]
        if config.norm_topk_prob:
            gates = gates / (gates.sum() + 1e-20)
        indices.append(chosen)
        weights.append(gates * config.routed_scaling_factor)
    return np.array(indices), np.array(weights)


def router_scores(config: ModelConfig, w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """Affinities [T, E]: sigmoid(u e_i) (paper 2, equation 15) or V2's softmax; `prefix` is e.g. "layers.1.mlp"."""
    logits = x_TD @ w[f"{prefix}.gate.weight"]
    return sigmoid(logits) if config.scoring_func == "sigmoid" else softmax(logits)


def swiglu(x_TD: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """(silu(x W_gate) * (x W_up)) W_down, where silu(x) = x sigmoid(x)."""
    gated = x_TD @ gate
    return (gated * sigmoid(gated) * (x_TD @ up)) @ down


def dense_ffn(w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """A SwiGLU feed-forward, e.g. of `prefix` "layers.0.mlp" or "layers.1.mlp.shared_experts"."""
    return swiglu(x_TD, *(w[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def moe(config: ModelConfig, w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """Shared experts plus the weighted routed ones (paper 2, equation 12, without the residual u_t)."""
    indices_TK, weights_TK = route(config, router_scores(config, w, prefix, x_TD),
                                   w[f"{prefix}.gate.e_score_correction_bias"])
    output_TD = dense_ffn(w, f"{prefix}.shared_experts", x_TD) if config.n_shared_experts else np.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for expert, weight in zip(indices_TK[t], weights_TK[t], strict=True):
            matrices = (w[f"{prefix}.experts.{part}_proj"][expert] for part in ("gate", "up", "down"))
            output_TD[t] += weight * swiglu(x_TD[t], *matrices)
    return output_TD


def sequence_balance_loss(config: ModelConfig, scores_BTE: np.ndarray) -> float:
    """Mean over sequences of sum_i f_i P_i, without alpha (paper 2, equations 17 to 20); no bias and no groups."""
    per_sequence = []
    for scores_TE in scores_BTE:
        tokens, experts = scores_TE.shape
        counts_E, share_E = np.zeros(experts), np.zeros(experts)
        for scores_E in scores_TE:
            counts_E[best(list(scores_E), config.num_experts_per_tok)] += 1
            share_E += scores_E / scores_E.sum() / tokens
        frequency_E = experts / (config.num_experts_per_tok * tokens) * counts_E
        per_sequence.append(frequency_E @ share_E)
    return float(np.mean(per_sequence))


def block(config: ModelConfig, w: Weights, prefix: str, x_TD: np.ndarray) -> np.ndarray:
    """One pre-norm layer: attention, then experts where the layer has a router, else a dense feed-forward."""
    normed = rms_norm(x_TD, w[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
    attention = mla if config.attention == "mla" else gqa
    x_TD = x_TD + attention(config, w, f"{prefix}.self_attn", normed)
    normed = rms_norm(x_TD, w[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
    if f"{prefix}.mlp.gate.weight" in w:
        return x_TD + moe(config, w, f"{prefix}.mlp", normed)
    return x_TD + dense_ffn(w, f"{prefix}.mlp", normed)


def mtp(config: ModelConfig, w: Weights, prefix: str, hidden_TD: np.ndarray, embedded_TD: np.ndarray) -> np.ndarray:
    """h^k = TRM_k(M_k [norm(Emb(t_{i+k})); norm(h_i^{k-1})]) (paper 2, equations 21 and 22); `prefix` is "mtp.0".

    The embedding half comes first, as in the published weights (the paper writes it second).
    """
    joined = np.concatenate([rms_norm(embedded_TD, w[f"{prefix}.enorm.weight"], config.rms_norm_eps),
                             rms_norm(hidden_TD, w[f"{prefix}.hnorm.weight"], config.rms_norm_eps)], axis=-1)
    return block(config, w, f"{prefix}.block", joined @ w[f"{prefix}.eh_proj.weight"])


def forward_sequence(config: ModelConfig, w: Weights, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits [T, V] of the main model and of each prediction depth, for T + depth tokens (equation 23)."""
    length = len(tokens) - config.num_nextn_predict_layers
    hidden_TD = w["embed_tokens.weight"][tokens[:length]]
    for layer in range(config.num_hidden_layers):
        hidden_TD = block(config, w, f"layers.{layer}", hidden_TD)
    normed_TD = rms_norm(hidden_TD, w["norm.weight"], config.rms_norm_eps)
    logits = [normed_TD @ w["lm_head.weight"]]
    if config.mtp_hidden == "post_norm":
        hidden_TD = normed_TD
    for depth in range(1, config.num_nextn_predict_layers + 1):
        prefix, embedded_TD = f"mtp.{depth - 1}", w["embed_tokens.weight"][tokens[depth:depth + length]]
        hidden_TD = mtp(config, w, prefix, hidden_TD, embedded_TD)
        logits.append(rms_norm(hidden_TD, w[f"{prefix}.norm.weight"], config.rms_norm_eps) @ w["lm_head.weight"])
    return logits


def forward(config: ModelConfig, weights: Weights, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens [B, T + depth] -> (logits [B, T, V], logits [B, T, V] of each prediction depth)."""
    sequences = [forward_sequence(config, weights, row) for row in tokens]
    main, *depths = (np.stack(logits) for logits in zip(*sequences, strict=True))
    return main, depths


def mean_nll(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    shifted = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-np.take_along_axis(log_probabilities, targets_BT[..., None], axis=-1).mean())


def losses(config: ModelConfig, weights: Weights, tokens: np.ndarray) -> tuple[float, list[float]]:
    """Tokens [B, T + depth + 1] -> mean NLL of tokens[:, i+1] and, per depth k, of tokens[:, i+k+1] (equation 24)."""
    main, depths = forward(config, weights, tokens[:, :-1])
    length = main.shape[1]
    return (mean_nll(main, tokens[:, 1:length + 1]),
            [mean_nll(logits, tokens[:, k + 1:length + k + 1]) for k, logits in enumerate(depths, start=1)])


def layer_shapes(config: ModelConfig, prefix: str, dense: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's weights."""
    c, hidden, experts, width = config, config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    heads, query = c.num_attention_heads, c.num_attention_heads * c.qk_head_dim
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
              "self_attn.kv_a_proj_with_mqa.weight": (hidden, c.kv_lora_rank + c.qk_rope_head_dim),
              "self_attn.kv_a_layernorm.weight": (c.kv_lora_rank,),
              "self_attn.kv_b_proj.weight": (c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim)),
              "self_attn.o_proj.weight": (heads * c.v_head_dim, hidden)}
    if c.attention != "mla":
        shared = (1 if c.attention == "mqa" else c.num_key_value_heads) * c.head_dim
        shapes = {name: shape for name, shape in shapes.items() if "self_attn" not in name}
        shapes |= {"self_attn.q_proj.weight": (hidden, heads * c.head_dim), "self_attn.k_proj.weight": (hidden, shared),
                   "self_attn.v_proj.weight": (hidden, shared), "self_attn.o_proj.weight": (heads * c.head_dim, hidden)}
    elif c.q_lora_rank is None:
        shapes["self_attn.q_proj.weight"] = (hidden, query)
    else:
        shapes |= {"self_attn.q_a_proj.weight": (hidden, c.q_lora_rank),
                   "self_attn.q_a_layernorm.weight": (c.q_lora_rank,),
                   "self_attn.q_b_proj.weight": (c.q_lora_rank, query)}
    if not dense:
        shapes |= {"mlp.gate.weight": (hidden, experts), "mlp.gate.e_score_correction_bias": (experts,),
                   "mlp.experts.gate_proj": (experts, hidden, width), "mlp.experts.up_proj": (experts, hidden, width),
                   "mlp.experts.down_proj": (experts, width, hidden)}
    name, inner = ("mlp", c.intermediate_size) if dense else ("mlp.shared_experts", c.n_shared_experts * width)
    if inner:
        shapes |= {f"{name}.gate_proj.weight": (hidden, inner), f"{name}.up_proj.weight": (hidden, inner),
                   f"{name}.down_proj.weight": (inner, hidden)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,),
                                          "lm_head.weight": (hidden, config.vocab_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= layer_shapes(config, f"layers.{layer}", dense=layer < config.first_k_dense_replace)
    for depth in range(config.num_nextn_predict_layers):
        shapes |= {f"mtp.{depth}.{name}.weight": (hidden,) for name in ("enorm", "hnorm", "norm")}
        shapes |= {f"mtp.{depth}.eh_proj.weight": (2 * hidden, hidden)}
        shapes |= layer_shapes(config, f"mtp.{depth}.block", dense=False)
    return shapes


def random_weights(config: ModelConfig, seed: int, scale: float = 1.0) -> Weights:
    """Normal weights that keep activations O(1); every value is exact in float32, so both sides start equal.

    Matrices have standard deviation scale/sqrt(in), norm gains 1 +- 0.1, balancing biases 0.1 (never a zero).
    """
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        draw = random.standard_normal(shape)
        if name.endswith("e_score_correction_bias"):
            value = 0.1 * draw
        elif "norm" in name.split(".")[-2]:
            value = 1.0 + 0.1 * draw
        else:
            value = scale * draw / (1.0 if name.startswith("embed") else math.sqrt(shape[-2]))
        weights[name] = value.astype(np.float32).astype(np.float64)
    return weights
