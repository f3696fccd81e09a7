"""Tokens a second of one sequence on a PC or a server: as many as its memories can read weights and cache for.

    seconds a token = bytes read from the GPU's memory / its bandwidth + bytes read from the other / its bandwidth

A token reads the weights it activates, once, and the cache of its context; the two memories take turns, since a layer
waits for the one before it. Where there is a GPU it holds what every token reads (attention, shared experts, dense
layers, head, cache), as far as it has room, and the other memory holds the routed experts (KTransformers, paper 1,
section 2.2.2). Computing and launches are free, so this is an upper bound; so is nominal bandwidth.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.dense_models import DenseModel
from dsv3_jax.codesign.local_machines import LocalMachine
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.inference.cache import bytes_per_token

BITS: dict[str, float] = {
    "q4_0": 4.5,  # llama.cpp: blocks of 32 weights of 4 bits, with a float16 scale
    "q4_k_m": 4.82,  # llama.cpp's mixture: DeepSeek-V3's 671.0 B weights take 404.5 GB (mradermacher/DeepSeek-V3-GGUF)
    "q8_0": 8.5,  # blocks of 32 weights of 8 bits, with a float16 scale
    "fp8": 8 + 32 / 128 ** 2,  # as published, a float32 scale for 128x128 weights
    "bf16": 16,
}
"""Bits of a weight, scales included."""


class Weights(NamedTuple):
    """Of a model without its prediction modules."""

    total: float
    routed: float
    """Of routed experts, that one token reads."""
    always: float
    """That every token reads: all others but the embedding table, of which it reads a row."""
    cache_bytes: float
    """Of one token in bf16."""


def weights_of(model: ModelConfig | DenseModel) -> Weights:
    """What a token of `model` reads; nothing of a dense model is routed."""
    if isinstance(model, DenseModel):
        return Weights(model.parameters, 0, model.matrix_weights, model.cache_bytes_per_token())
    count = count_parameters(model)
    routed = count.by_part["routed experts"] * model.num_experts_per_tok / model.n_routed_experts
    return Weights(count.main, routed, count.activated_without_embedding - routed,
                   bytes_per_token(model, mtp=False))


class Speed(NamedTuple):
    """Upper bounds of tokens a second, and what they come from."""

    nominal: float
    effective: float
    """At the bandwidths that are reached, where published."""
    gpu_bytes: float
    """Read from the GPU's memory for a token."""
    memory_bytes: float
    """Read from the other."""
    model_bytes: float
    """All weights and the cache."""


def tokens_per_second(model: ModelConfig | DenseModel, machine: LocalMachine, bits: float,
                      context: int = 1024) -> Speed:
    """Bound of one sequence with `context` tokens in its cache and weights of `bits`.

    Raises:
      ConfigError: a number makes no sense, or the model does not fit the machine's memories.
    """
    positive(bits=bits)
    not_negative(context=context)
    weights = weights_of(model)
    cache = context * weights.cache_bytes
    model_bytes, room = weights.total * bits / 8 + cache, machine.gpu.bytes if machine.gpu else 0.0
    if model_bytes > machine.memory.bytes + room:
        raise ConfigError(f"{model_bytes / 1e9:.0f} GB at {bits:g} bits a weight exceed the "
                          f"{(machine.memory.bytes + room) / 1e9:.0f} GB of {machine.name}: take fewer bits, a smaller "
                          "model or context, or another machine")
    on_gpu = min(weights.always * bits / 8 + cache, room)
    in_memory = (weights.routed + weights.always) * bits / 8 + cache - on_gpu

    def rate(gpu: float, memory: float) -> float:
        return 1 / ((on_gpu / gpu if on_gpu else 0.0) + in_memory / memory)
    gpu = machine.gpu or machine.memory
    return Speed(rate(gpu.bandwidth, machine.memory.bandwidth), rate(gpu.effective, machine.memory.effective), on_gpu,
                 in_memory, model_bytes)
