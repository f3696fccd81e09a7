"""Which layers a stage has: cuts that make the dearest stage cheapest."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsv3_jax.config import ConfigError, ModelConfig


class StageLayers(NamedTuple):
    """Layers of one stage, in order: dense ones, then MoE layers. The first stage also embeds; the last one has the
    final norm, the multi-token-prediction modules and the output head."""

    dense: range
    """Numbers among the dense layers."""
    moe: range
    """Numbers among the MoE layers."""
    first: bool
    last: bool


def cut_model(model: ModelConfig, stages: int) -> list[StageLayers]:
    """Stages of about equal computing; of such cuts those with fewest MoE layers in a stage.

    Costs are the weights that one token uses: a dense layer of V3 costs what a MoE layer does, a pass through the head
    1.6 of them. V3 in 16 stages: 3 dense and 2 MoE layers, 14 times 4, and what comes last by itself.

    Raises:
      ConfigError: fewer layers than can be divided.
    """
    dense, moe, head = _weights_used(model)
    last = head + model.num_nextn_predict_layers * (moe + head)
    costs = [dense] * model.first_k_dense_replace + [moe] * model.num_moe_layers + [last]
    scarce = [0] * model.first_k_dense_replace + [1] * model.num_moe_layers + [0]
    if stages > len(costs):
        raise ConfigError(f"mesh.pipe ({stages} stages) must be at most {len(costs)}, the layers and what comes last: "
                          "take fewer ranks, or a schedule with one stage a rank")
    out, begin = [], 0
    for index, size in enumerate(_sizes(costs, scarce, stages)):
        bounds = [(min(n, model.first_k_dense_replace), min(max(n - model.first_k_dense_replace, 0),
                                                            model.num_moe_layers)) for n in (begin, begin + size)]
        (dense_from, moe_from), (dense_to, moe_to) = bounds
        out.append(StageLayers(range(dense_from, dense_to), range(moe_from, moe_to), index == 0, index == stages - 1))
        begin += size
    return out


def _weights_used(model: ModelConfig) -> tuple[int, int, int]:
    """By one token: in a dense layer, a MoE layer, the head."""
    width, heads = model.hidden_size, model.num_attention_heads
    attention = heads * model.value_head_dim * width
    if model.attention == "mla":
        queries = heads * model.qk_head_dim
        attention += width * queries if model.q_lora_rank is None else model.q_lora_rank * (width + queries)
        attention += width * (model.kv_lora_rank + model.qk_rope_head_dim)
        attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    else:
        attention += width * model.value_head_dim * (heads + 2 * (model.num_key_value_heads or heads))
    experts = model.num_experts_per_tok + model.n_shared_experts
    return (attention + 3 * width * model.intermediate_size,
            attention + 3 * width * model.moe_intermediate_size * experts, model.vocab_size * width)


def _sizes(costs: Sequence[int], scarce: Sequence[int], stages: int) -> list[int]:
    """How many each stage takes, in order, none of them nothing: least in the dearest stage, then least of what is
    scarce in any, then most even."""
    prices = sorted({sum(costs[i:j]) for i in range(len(costs)) for j in range(i + 1, len(costs) + 1)})
    dearest = _least(prices, lambda limit: _most_even(costs, scarce, stages, limit, len(costs)))
    most = _least(range(len(costs) + 1), lambda limit: _most_even(costs, scarce, stages, dearest, limit))
    sizes = _most_even(costs, scarce, stages, dearest, most)
    assert sizes is not None
    return sizes


def _least(limits: Sequence[int], works: Callable[[int], object]) -> int:
    """The first of ascending limits that works."""
    return limits[bisect.bisect_left(limits, True, key=lambda limit: bool(works(limit)))]


def _most_even(costs: Sequence[int], scarce: Sequence[int], stages: int, dearest: int, most: int) -> list[int] | None:
    """The sizes with the least sum of squared costs within both limits, larger ones first; None if there are none."""
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(math.inf, [])] * len(costs)]
    for _ in range(stages):
        then: list[tuple[float, list[int]]] = [(math.inf, [])] * (len(costs) + 1)
        for begin, (sum_before, sizes) in enumerate(best):
            cost = count = 0
            for end in range(begin + 1, len(costs) + 1):
                cost, count = cost + costs[end - 1], count + scarce[end - 1]
                if sum_before == math.inf or cost > dearest or count > most:
                    break
                if sum_before + cost * cost <= then[end][0]:
                    then[end] = (sum_before + float(cost) * cost, [*sizes, end - begin])
        best = then
    return best[-1][1] or None
