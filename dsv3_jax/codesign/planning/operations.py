"""What a layer does on one device for one micro-batch: matrix products, attention's core, and passes over memory.

The recipe is paper 2's (sections 3.2.3 and 3.3). Passes over memory are those that the kernels of `pallas_kernels`
leave: each reads its inputs and writes its outputs once, casts to float8 fused into whoever makes the value, in both
tilings where the backward needs both (1x128 for inputs' gradients, 128x1 for weights'). Scales, gains and the plan's
integers are left out.

Legend: D hidden, H heads, I an expert's inner width, K experts a token; a *row* is one token for one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import ModelConfig, Recompute

Phase = Literal["forward", "input", "weight"]
"""Forward; gradients of inputs, with what is computed again; gradients of weights."""
Kind = Literal["product", "experts", "weight", "core", "core_backward", "memory"]
Layer = Literal["dense", "experts", "prediction", "head"]
"""A decoder layer of either kind; a prediction module up to its head, and the head with its loss."""


_GRADIENT = 2
"""Bytes of a gradient's value that linear layers read: bf16, or E4M3 in both tilings."""
_BOTH_WAYS: tuple[tuple[Phase, str], ...] = (("forward", ""), ("input", ", backward"))


class Operation(NamedTuple):
    """One kernel, or a few alike."""

    name: str
    phase: Phase
    kind: Kind
    flops: float = 0.0
    n: int = 0
    k: int = 0
    """Of weights [k, n], so that rows [*, k] become [*, n]; of attention's core, widths of keys and of values."""
    bytes: float = 0.0
    """Read and written by passes over memory; of products, the weights."""
    fp8: bool = False


@dataclass(frozen=True)
class Work:
    """What one device does in one micro-batch."""

    model: ModelConfig
    tokens: float
    """Of the device."""
    length: int
    """Tokens of a sequence."""
    fp8: bool
    recompute: Recompute
    rows: RowsAToken
    context: int = 1
    """Devices that share a sequence; each projects all of its keys and values."""
    fast_devices: int = 1
    """Of one fast domain that experts are spread over."""
    imbalance: float = 1.0
    """Rows of the fullest device over the mean, for which all wait."""

    @property
    def expert_rows(self) -> float:
        return self.tokens * self.model.num_experts_per_tok * self.imbalance

    @property
    def copies(self) -> float:
        """Tokens' copies on devices that have an expert of them or bring them into its node, at most one for a row."""
        return min(self.tokens * (self.rows.fast_rows + self.rows.nodes) * self.imbalance, self.expert_rows)

    @property
    def narrow(self) -> int:
        """Bytes of a value that a linear layer reads."""
        return 1 if self.fp8 else 2


def layer_operations(work: Work, layer: Layer) -> list[Operation]:
    """All phases of one layer, exchanges with other devices aside."""
    if layer == "head":
        return list(_head(work))
    operations = [*_attention(work), *(_dense(work) if layer == "dense" else _experts(work))]
    if layer == "prediction":
        operations += _linear(work, "prediction module's join", 2 * work.model.hidden_size, work.model.hidden_size)
    if work.recompute == "full":
        operations += [operation._replace(phase="input", name=f"{operation.name} again")
                       for operation in operations if operation.phase == "forward"]
    return operations


def _linear(work: Work, name: str, k: int, n: int, rows: float | None = None, kind: Kind = "product",
            fp8: bool | None = None, weights: float | None = None) -> Iterator[Operation]:
    """A linear layer: its product and both gradients'."""
    float8 = work.fp8 if fp8 is None else fp8
    flops = 2.0 * k * n * (work.tokens if rows is None else rows)
    size = (k * n if weights is None else weights) * (1 if float8 else 2)
    yield Operation(name, "forward", kind, flops, n, k, size, float8)
    yield Operation(f"{name}, input's gradient", "input", kind, flops, k, n, size, float8)
    yield Operation(f"{name}, weight's gradient", "weight", "weight", flops, n, k, 0.0, float8)


def _memory(name: str, phase: Phase, size: float) -> Operation:
    return Operation(name, phase, "memory", bytes=size)


def _attention(work: Work) -> Iterator[Operation]:
    """Multi-head latent attention, or grouped queries, with its norm and residual."""
    m, t, d, narrow = work.model, work.tokens, work.model.hidden_size, work.narrow
    heads, out = m.num_attention_heads, m.num_attention_heads * m.value_head_dim
    yield _memory("attention's norm", "forward", t * d * (2 + narrow))
    if m.attention == "mla":
        yield from _latents(work)
    else:
        yield from _linear(work, "queries, keys, values", d, (heads + 2 * m.kv_heads) * m.kv_head_dim)
    keys = min(m.attention_window or work.length, work.length) / 2
    core = 2.0 * t * heads * (m.qk_head_dim + m.value_head_dim) * keys
    widths = (m.qk_head_dim, m.value_head_dim)
    yield Operation("attention's core", "forward", "core", core, *widths)
    # Five products instead of two: scores again, then one for each of the four operands.
    yield Operation("attention's core, backward", "input", "core_backward", 2.5 * core, *widths)
    yield _memory("sums over outputs and their gradients", "input", t * out * 4)
    wide = heads * (2 * m.qk_head_dim + m.value_head_dim)
    yield _memory("gradients of queries, keys, values: rotation and casts", "input", t * wide * (2 + _GRADIENT))
    if work.fp8:  # E4M3 for the product, E5M6 for the backward (section 3.3.3)
        yield _memory("attention's output cast", "forward", t * out * (2 + 1 + 1.5))
        yield _memory("attention's output retiled", "weight", t * out * (1.5 + 1))
        yield _memory("gradient after attention cast", "input", t * d * (2 + _GRADIENT))
        yield _memory("attention's inputs retiled", "weight", 2 * t * d)
    yield from _linear(work, "attention's output", out, d)
    yield _memory("residual", "forward", t * d * 6)
    yield _memory("attention's norm, backward", "input", t * d * 10)


def _latents(work: Work) -> Iterator[Operation]:
    """Projections down to the latents and up to heads; norms and up-projections are computed again (3.2.3)."""
    m, t, narrow = work.model, work.tokens, work.narrow
    heads, query = m.num_attention_heads, m.q_lora_rank or 0
    down = m.kv_lora_rank + m.qk_rope_head_dim + (query or heads * m.qk_head_dim)
    yield from _linear(work, "projections down", m.hidden_size, down)
    latents = query + m.kv_lora_rank
    yield _memory("latents' norms", "forward", t * latents * (2 + narrow))
    yield _memory("latents' norms, backward", "input", t * latents * (6 + _GRADIENT))
    ups = [*_linear(work, "queries up", query, heads * m.qk_head_dim)] if query else []
    ups += _linear(work, "keys and values up", m.kv_lora_rank, heads * (m.qk_nope_head_dim + m.v_head_dim),
                   rows=work.context * t)
    # Rotated parts of queries in place; keys put together from the part of each head and the shared one.
    ups.append(_memory("rotation", "forward", t * heads * (4 * m.qk_rope_head_dim + 2 * m.qk_nope_head_dim
                                                           + 2 * m.qk_head_dim)))
    yield from ups
    if work.recompute in ("paper", "experts"):
        for operation in ups:
            if operation.phase == "forward":
                yield operation._replace(phase="input", name=f"{operation.name}, again")
    if work.fp8:
        yield _memory("latents retiled", "weight", t * latents * 2)


def _gated(work: Work, name: str, inner: int, rows: float, kind: Kind, weights: float) -> Iterator[Operation]:
    """SwiGLU: gate and up in one product, down in another; its input is kept and its output computed again."""
    d, narrow = work.model.hidden_size, work.narrow
    yield from _linear(work, f"{name}, gate and up", d, 2 * inner, rows, kind, weights=weights * 2 / 3)
    yield from _linear(work, f"{name}, down", inner, d, rows, kind, weights=weights / 3)
    kept = 2 * inner if work.fp8 else 0
    yield _memory(f"{name}, SwiGLU", "forward", rows * (2 * 2 * inner + narrow * inner + kept))
    yield _memory(f"{name}, SwiGLU backward", "input",
                  rows * (2 * inner + narrow * 2 * inner + _GRADIENT * 2 * inner + narrow * inner))
    if work.fp8:
        yield _memory(f"{name}, inputs retiled", "weight", rows * d * 2)


def _dense(work: Work) -> Iterator[Operation]:
    """A feed-forward that all tokens share."""
    m, t, d = work.model, work.tokens, work.model.hidden_size
    yield _memory("feed-forward's norm", "forward", t * d * (2 + work.narrow))
    yield from _gated(work, "feed-forward", m.intermediate_size, t, "product", 3.0 * d * m.intermediate_size)
    yield _memory("residual", "forward", t * d * 6)
    if work.fp8:
        yield _memory("gradient cast", "input", t * d * (2 + _GRADIENT))
    yield _memory("feed-forward's norm, backward", "input", t * d * 10)


def _experts(work: Work) -> Iterator[Operation]:
    """Router, shared and routed experts, and what the exchange leaves to do on the device."""
    m, t, d, narrow = work.model, work.tokens, work.model.hidden_size, work.narrow
    rows, copies, nodes = work.expert_rows, work.copies, t * work.rows.nodes
    yield _memory("experts' norm", "forward", t * d * (4 + (1 if work.fp8 else 0)))
    yield from _linear(work, "router", d, m.n_routed_experts, fp8=False)
    if m.n_shared_experts:
        inner = m.n_shared_experts * m.moe_intermediate_size
        yield from _gated(work, "shared expert", inner, t, "product", 3.0 * d * inner)
    yield from _gated(work, "experts", m.moe_intermediate_size, rows, "experts", 0.0)
    for phase, back in _BOTH_WAYS:
        yield _memory(f"copies to experts' rows{back}", phase, (copies + rows) * d * narrow)
        yield _memory(f"rows' sums{back}", phase, (rows + copies) * d * 2)
        yield _memory(f"nodes' sums{back}", phase, (copies + nodes) * d * 2)
        yield _memory(f"tokens' sums{back}", phase, (nodes + 3 * t) * d * 2)
    if work.fp8:
        yield _memory("gradient cast", "input", t * d * (2 + _GRADIENT))
        yield _memory("experts' gradients retiled", "weight", rows * d * 2)
    if work.recompute == "experts":
        yield Operation("experts, gate and up, again", "input", "experts", 4.0 * rows * d * m.moe_intermediate_size,
                        2 * m.moe_intermediate_size, d, 0.0, work.fp8)
        yield _memory("copies to experts' rows, again", "input", (copies + rows) * d * narrow)
    yield _memory("experts' norm, backward", "input", t * d * 10)


def _head(work: Work) -> Iterator[Operation]:
    """Norm, logits in bf16 and their loss in float32 (section 3.3.1)."""
    m, t = work.model, work.tokens
    yield from _linear(work, "head", m.hidden_size, m.vocab_size, fp8=False)
    yield _memory("loss", "forward", t * m.vocab_size * 6)  # written in float32, read as it is summed up
    yield _memory("loss, backward", "input", t * m.vocab_size * 6)  # read, and written in bf16
    yield _memory("head's norm", "forward", t * m.hidden_size * 4)
    yield _memory("head's norm, backward", "input", t * m.hidden_size * 10)
