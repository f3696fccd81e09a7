"""How fast one sequence can be decoded when experts are spread over many devices (paper 1, section 2.3.2).

In every layer a device sends the tokens of a micro-batch to their experts and gets the results back:

    exchange = (dispatch bytes + combine bytes) * tokens * experts a token * hidden / bandwidth

Two micro-batches take turns, one computing while the other is on the network. Where computing takes no longer than the
exchange, as the paper assumes, a layer takes 2 * exchange and a token layers * 2 * exchange: `speed_limit`. To that
`decode_step` adds what computing takes at the least, from bytes read and FLOPs at peak rates, so a layer takes

    2 * max(exchange, attention + experts).

Everything else (latencies unless asked for, launches, imbalance, what rates are reached) makes it slower.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from dsv3_jax.codesign.checks import at_least, positive, share
from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.links import Link
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.inference.cache import CacheFormat, bytes_per_token, cached_entries

MICRO_BATCHES = 2
"""That take turns on the network (paper 1, section 2.3.1)."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded. Defaults are the paper's: 32 tokens a device at a time, float8 there and bf16 back, one expert a
    device."""

    model: ModelConfig
    tokens: int = 32
    """Of one device in one micro-batch, drafts included."""
    context: int = 4096
    """Tokens in the cache of a sequence."""
    hidden: int | None = None
    """Instead of the model's 7168; the paper calculates with 7K, 7000."""
    dispatch_bytes: float = 1
    combine_bytes: float = 2
    """Of one value."""
    expert_devices: int | None = None
    """Devices that routed and shared experts are spread over; None: one expert a device."""
    weight_bytes: float = 1
    """Of one weight; the output head has 2 at least, being in bf16 (paper 2, section 3.3.1)."""
    cache: CacheFormat = "bf16"
    drafts: int = 0
    """Of multi-token prediction, verified in the same pass: a sequence has 1 + drafts of the tokens."""
    acceptance: float = 0.85
    """Chance that a draft is accepted if those before it are (80 to 90%: paper 1, section 2.3.3)."""

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, context=self.context)
        for name in ("hidden", "expert_devices"):
            if getattr(self, name) is not None:
                at_least(1, **{name: getattr(self, name)})
        positive(dispatch_bytes=self.dispatch_bytes, combine_bytes=self.combine_bytes, weight_bytes=self.weight_bytes)
        share(acceptance=self.acceptance)
        if not 0 <= self.drafts < self.tokens:
            raise ConfigError(f"drafts ({self.drafts}) must be at least 0 and below tokens ({self.tokens}), of which a "
                              "sequence has 1 + drafts")
        if self.drafts and not self.model.num_nextn_predict_layers:
            raise ConfigError(f"drafts ({self.drafts}) must be 0: the model has no multi-token prediction")

    @property
    def rows(self) -> int:
        """That a device sends to experts in one layer, and receives with even load: K routed and the shared ones, which
        the paper treats as routed."""
        return self.tokens * (self.model.num_experts_per_tok + self.model.n_shared_experts)

    @property
    def sequences(self) -> float:
        """Of one device in one micro-batch."""
        return self.tokens / (1 + self.drafts)

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens that one pass adds to a sequence: itself, and drafts up to the first that is refused."""
        return sum(self.acceptance ** accepted for accepted in range(self.drafts + 1))


class Limit(NamedTuple):
    """Seconds, and tokens a second of one sequence."""

    exchange: float
    """Dispatch and combine of one micro-batch in one layer."""
    layer: float
    """Both micro-batches."""
    token: float
    """All layers: the time per output token, or per pass with drafts."""
    tokens_per_second: float


def exchange_bytes(work: Workload) -> float:
    """What a device sends in one layer for one micro-batch, there and back. Scales and the plan are not counted."""
    return (work.dispatch_bytes + work.combine_bytes) * work.rows * (work.hidden or work.model.hidden_size)


def exchange_seconds(work: Workload, link: Link, reached: bool = False) -> float:
    """Time of that at the nominal bandwidth; or at what is reached, with the latency of both ways where one is
    known."""
    if reached:
        return exchange_bytes(work) / link.effective + 2 * (link.latency or 0.0)
    return exchange_bytes(work) / link.bandwidth


def speed_limit(work: Workload, link: Link) -> Limit:
    """The paper's limit: all layers exchange, computing is hidden, no latency. 120.96 us, 14.76 ms and 67 tokens/s on
    InfiniBand CX7 of 50 GB/s; 6.72 us, 0.82 ms and about 1,200 on NVL72 of 900 GB/s. A draft costs one more layer."""
    exchange = exchange_seconds(work, link)
    layer = MICRO_BATCHES * exchange
    token = layer * (work.model.num_hidden_layers + work.drafts)
    return Limit(exchange, layer, token, work.tokens_per_pass / token)


class Step(NamedTuple):
    """Seconds of one micro-batch; `token` of a whole pass of both."""

    exchange: float
    attention: float
    """Of one layer: projections, and attention over the context."""
    experts: float
    """Of one layer."""
    dense: float
    """Feed-forward of one layer without experts."""
    head: float
    token: float
    bound: str
    """What a layer with experts waits for: network or compute."""
    tokens_per_second: float
    """Of one sequence, accepted drafts included."""
    device_tokens_per_second: float
    """Of all sequences of a device."""


def decode_step(work: Workload, hardware: Hardware, link: Link | None = None, reached: bool = False) -> Step:
    """The least time of one pass, each part by the larger of bytes over HBM bandwidth and FLOPs over peak.

    Args:
      link: what experts are reached over; None: the hardware's slow network.
      reached: whether the link is taken at what it reaches, see `exchange_seconds`.
    """
    m = work.model
    exchange = exchange_seconds(work, link or hardware.scale_out, reached)
    attention, experts = attention_seconds(work, hardware), experts_seconds(work, hardware)
    dense = _weights_seconds(work, hardware, 3.0 * m.hidden_size * m.intermediate_size, work.tokens)
    head = _weights_seconds(work, hardware, float(m.vocab_size * m.hidden_size), work.tokens, least_bytes=2)
    layer = max(exchange, attention + experts)
    token = MICRO_BATCHES * ((m.num_moe_layers + work.drafts) * layer + m.first_k_dense_replace * (attention + dense)
                             + (1 + work.drafts) * head)
    one = work.tokens_per_pass / token
    return Step(exchange, attention, experts, dense, head, token,
                "network" if exchange >= attention + experts else "compute", one,
                one * MICRO_BATCHES * work.sequences)


def attention_seconds(work: Workload, hardware: Hardware) -> float:
    """Least time of one layer's attention for one micro-batch: weights and cache are read; MLA's scores and values are
    of the latent, its up-projections absorbed (paper 2, section 2.1.1)."""
    m = work.model
    weights = count_parameters(m).by_part["attention"] / m.num_hidden_layers
    seen = cached_entries(m, work.context, mtp=False)
    read = (weights * work.weight_bytes
            + work.sequences * seen * bytes_per_token(m, work.cache, mtp=False) / m.num_hidden_layers)
    widths = 2 * m.kv_lora_rank + m.qk_rope_head_dim if m.attention == "mla" else 2 * m.kv_head_dim
    core = 2.0 * m.num_attention_heads * widths * seen  # in bf16 whatever the weights' format (paper 2, section 3.3.1)
    computing = work.tokens * (2.0 * weights / _peak(work, hardware) + core / hardware.peak_flops["bf16"])
    return max(read / hardware.hbm_bandwidth, computing)


def experts_seconds(work: Workload, hardware: Hardware) -> float:
    """Least time of a device's experts for one micro-batch: as many rows come in as go out."""
    m = work.model
    here = 1 if work.expert_devices is None else math.ceil(
        (m.n_routed_experts + m.n_shared_experts) / work.expert_devices)
    one = 3.0 * m.hidden_size * m.moe_intermediate_size
    return max(min(here, work.rows) * one * work.weight_bytes / hardware.hbm_bandwidth,
               2.0 * work.rows * one / _peak(work, hardware))


def _weights_seconds(work: Workload, hardware: Hardware, weights: float, rows: float,
                     least_bytes: float = 0) -> float:
    """Of a product that reads `weights` once for all rows."""
    size = max(work.weight_bytes, least_bytes)
    peak = _peak(work, hardware) if size <= 1 else hardware.peak_flops["bf16"]
    return max(weights * size / hardware.hbm_bandwidth, 2.0 * weights * rows / peak)


def _peak(work: Workload, hardware: Hardware) -> float:
    """FLOP/s of products with weights of the workload's width."""
    bf16 = hardware.peak_flops["bf16"]
    return hardware.peak_flops.get("fp8", bf16) if work.weight_bytes <= 1 else bf16
