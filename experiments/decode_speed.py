"""How fast a model decodes here, beside what this machine's memory would allow.

  python experiments/decode_speed.py --out experiments/results/decode_cpu

Weights are random: speed depends on their sizes, and on routing, which random weights balance better than trained ones.
Measures cached decoding, the whole forward pass for every token, and the time of each part of a decoding step. The
floor is the time to read, once, all bytes that a step must read, at the bandwidth measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.config import ConfigError, Execution, MeshConfig, ModelConfig, Precision, named
from dsv3_jax.inference.cache import LatentCache, bytes_per_token
from dsv3_jax.inference.forward import decode, prefill
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import TARGET, Sampling, draw, probabilities, sampling_rows
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.cached_attention import absorbed_attention
from dsv3_jax.nn.model import split_model
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, COMPUTE_FORMAT
from dsv3_jax.presets import MODELS
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, standard_output_for_json, write_report

# All parts of V3 in 114 million parameters, of which a token uses 26.
SMALL_100M = ModelConfig(
    vocab_size=16384, hidden_size=512, intermediate_size=2048, moe_intermediate_size=256, num_hidden_layers=8,
    first_k_dense_replace=1, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4, n_group=4,
    topk_group=2, routed_scaling_factor=2.5, num_nextn_predict_layers=0, max_position_embeddings=1024)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    model: str = "small_100m"
    """small_100m, or a preset."""
    precision: Precision = "float32"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    """Tokens of each prompt."""
    tokens: int = 48
    """Decoding steps timed."""
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    json: bool = False
    """Print the JSON."""


def read_bandwidth() -> float:
    """Bytes a second that this program reads from memory: the best of several sums of 256 MiB."""
    x = jnp.ones((2 ** 26,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / min(_seconds(lambda: total(x)) for _ in range(10))


def bytes_per_step(config: ModelConfig, precision: Precision, batch: int, length: int) -> dict[str, float]:
    """What a decoding step must read, by part; experts are those that `batch` tokens are expected to choose if routing
    is balanced and tokens choose alike independently."""
    size, count = jnp.dtype(COMPUTE_DTYPE[precision]).itemsize, count_parameters(config)
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    distinct = experts * (1 - (1 - chosen / experts) ** batch)
    embedding = config.vocab_size * config.hidden_size
    others = count.main - embedding - config.num_moe_layers * experts * one_expert
    return {"experts": size * config.num_moe_layers * distinct * one_expert, "other_weights": size * float(others),
            "cache": float(batch * length * bytes_per_token(config, COMPUTE_FORMAT[precision], mtp=False))}


def measure(config: ModelConfig, arguments: Arguments) -> dict[str, Any]:
    """All measurements, as plain values; times are medians."""
    bandwidth = read_bandwidth()
    generator = Generator(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), precision=arguments.precision)
    weights = generator.prepare(*_random_weights(config))
    result: dict[str, Any] = {"read_gb_per_second": bandwidth / 1e9, "batches": {}}
    for batch in arguments.batches:
        step = _decode_seconds(generator, weights, arguments, batch)
        needed = bytes_per_step(config, arguments.precision, batch, arguments.prompt + arguments.tokens // 2)
        floor = sum(needed.values()) / bandwidth
        again = _forward_seconds(generator, weights, arguments, batch)
        result["batches"][str(batch)] = {
            "decode_ms": 1e3 * step, "decode_tokens_per_second": batch / step,
            "forward_ms": 1e3 * again, "forward_tokens_per_second": batch / again,
            "floor_ms": 1e3 * floor, "share_of_floor": floor / step, "mb_per_step": {
                name: size / 1e6 for name, size in needed.items()},
            "parts_ms": {name: 1e3 * seconds for name, seconds in _parts(generator, weights, arguments, batch).items()}}
    return result


def _random_weights(config: ModelConfig) -> list[nnx.State]:
    """Parameters and router biases drawn by NumPy: to compile the model's own initialisation takes minutes at times."""
    rng = np.random.default_rng(0)

    def drawn(variable: nnx.Variable) -> nnx.Variable:
        shape, is_gain = variable.get_value().shape, len(variable.get_metadata("axes")) == 1
        noise = config.initializer_range * rng.standard_normal(shape, np.float32)
        return variable.replace(jnp.asarray(noise + is_gain))
    return [jax.tree.map(drawn, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
            for state in jax.eval_shape(lambda: split_model(config)[1:])]


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def _median(call: Callable[[], Any], times: int) -> float:
    jax.block_until_ready(call())
    return statistics.median(_seconds(call) for _ in range(times))


def _decode_seconds(generator: Generator, weights: nnx.State, arguments: Arguments, batch: int) -> float:
    """Seconds a step, as a user of `Generator` sees them: host work and transfers included."""
    prompts = list(np.random.default_rng(0).integers(0, generator.model.vocab_size, (batch, arguments.prompt)))
    for _ in range(2):  # the first compiles
        times = []
        for _ in generator.generate(weights, prompts, arguments.tokens + 1, Sampling(temperature=0)):
            times.append(time.perf_counter())
    return statistics.median(np.diff(times))


def _forward_seconds(generator: Generator, weights: nnx.State, arguments: Arguments, batch: int) -> float:
    """Seconds for a token without a cache: the forward pass over the text so far, halfway."""
    length = arguments.prompt + arguments.tokens // 2
    tokens = _tokens(generator.model, batch, length)

    @jax.jit
    def forward(state: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(generator.structure, state)
        cache = LatentCache.empty(model.config, batch, length, COMPUTE_FORMAT[arguments.precision], mtp=False)
        out = prefill(model, tokens, jnp.full((batch,), length), cache)  # what is written is not used, so not computed
        return jnp.argmax(model.logits(out.hidden_BQD[:, -1]), axis=-1)
    return _median(lambda: forward(weights, tokens), 5)


def _tokens(config: ModelConfig, batch: int, length: int) -> jax.Array:
    """Random, since equal rows would all go to the same experts."""
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)), jnp.int32)


def _parts(generator: Generator, weights: nnx.State, arguments: Arguments, batch: int) -> dict[str, float]:
    """Seconds of parts of a step, each compiled on its own and chained through the layers as the whole is."""
    model = nnx.merge(generator.structure, weights)
    config, length = model.config, arguments.prompt + arguments.tokens // 2
    layers = [*(model.dense_layers if config.first_k_dense_replace else ()), *model.moe_layers] \
        if isinstance(model.moe_layers, nnx.List) else []
    dtype = model.embed_tokens.weight[...].dtype
    hidden = jax.random.normal(jax.random.key(0), (batch, 1, config.hidden_size)).astype(dtype)
    cache = LatentCache.empty(config, batch, length + 8, COMPUTE_FORMAT[arguments.precision], mtp=False)
    cache = dataclasses.replace(cache, lengths_B=jnp.full((batch,), length))
    positions, rows = cache.lengths_B[:, None], sampling_rows([Sampling(temperature=0)] * batch)
    execution = Execution()

    def projections(state: nnx.State, hidden: jax.Array) -> jax.Array:
        for layer in _merged(generator, state):
            attention = layer.self_attn
            q, r = attention.query(layer.input_layernorm(hidden), positions)
            c, k = attention.latent(layer.input_layernorm(hidden), positions)
            mixed = (q.mean() + r.mean() + c.mean() + k.mean()).astype(hidden.dtype)
            out = jnp.broadcast_to(mixed, (batch, 1, config.num_attention_heads * config.v_head_dim))
            hidden += attention.o_proj(out)
        return hidden

    def core(state: nnx.State, hidden: jax.Array, cache: LatentCache) -> jax.Array:
        q = jnp.broadcast_to(hidden.mean(), (batch, 1, config.num_attention_heads, config.qk_head_dim))
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        total = hidden.mean()
        for index, layer in enumerate(_merged(generator, state)):
            out = absorbed_attention(layer.self_attn, q_nope + total, q_rope, cache.storage.read(index, dtype),
                                     positions, cache.lengths_B)
            total += out.mean()
        return total

    def feed_forward(state: nnx.State, hidden: jax.Array, moe: bool) -> jax.Array:
        for index, layer in enumerate(_merged(generator, state)):
            if (index >= config.first_k_dense_replace) == moe:
                hidden, _ = layer.feed_forward(hidden, execution)
        return hidden

    def head(state: nnx.State, hidden: jax.Array) -> jax.Array:
        logits = nnx.merge(generator.structure, state).logits(hidden[:, 0])
        seen = jnp.zeros(logits.shape, bool)
        return draw(probabilities(logits, seen, rows), rows.seed, cache.lengths_B, TARGET)

    def whole(state: nnx.State, tokens: jax.Array, cache: LatentCache) -> jax.Array:
        return decode(nnx.merge(generator.structure, state), tokens, cache).hidden_BQD
    if not layers:
        return {}
    parts: dict[str, Any] = {"attention_projections": jax.jit(projections), "attention_core": jax.jit(core),
             "experts": jax.jit(lambda s, h: feed_forward(s, h, True)),
             "dense": jax.jit(lambda s, h: feed_forward(s, h, False)), "head_and_sampling": jax.jit(head)}
    layers_only, tokens, seconds = jax.jit(whole), _tokens(config, batch, 1), {}
    for name, part in parts.items():
        operands = (weights, hidden, *([cache] if name == "attention_core" else []))
        seconds[name] = _median(functools.partial(part, *operands), 20)
    return seconds | {"all_layers": _median(lambda: layers_only(weights, tokens, cache), 20)}


def _merged(generator: Generator, state: nnx.State) -> list[Any]:
    model = nnx.merge(generator.structure, state)
    dense = list(model.dense_layers) if model.config.first_k_dense_replace else []
    return [*dense, *model.moe_layers]


def _about(arguments: Arguments, config: ModelConfig) -> dict[str, Any]:
    return {**provenance(), "load_average_at_start": os.getloadavg()[0], "model": arguments.model,
            "parameters": count_parameters(config).main, "precision": arguments.precision, "prompt": arguments.prompt,
            "tokens": arguments.tokens}


def as_markdown(result: dict[str, Any]) -> str:
    """A table a person reads."""
    about, parts = result["about"], next(iter(result["batches"].values()))["parts_ms"]
    lines = [f"# Decoding {about['model']} ({about['parameters'] / 1e6:.0f} M parameters, {about['precision']})", "",
             f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}; load average "
             f"{about['load_average_at_start']:.1f} before it started. Memory reads "
             f"{result['read_gb_per_second']:.1f} GB/s.", "",
             "| batch | cached decode, tokens/s | forward pass a token, tokens/s | ms a step | floor, ms | of floor |",
             "|---|---|---|---|---|---|"]
    for batch, m in result["batches"].items():
        lines.append(f"| {batch} | {m['decode_tokens_per_second']:.1f} | {m['forward_tokens_per_second']:.1f} | "
                     f"{m['decode_ms']:.2f} | {m['floor_ms']:.2f} | {100 * m['share_of_floor']:.0f}% |")
    lines += ["", "The floor reads each byte that a step needs once: " + "; ".join(
        f"batch {batch}: " + ", ".join(f"{name.replace('_', ' ')} {size:.1f} MB"
                                       for name, size in m["mb_per_step"].items())
        for batch, m in result["batches"].items()) + ".", "",
        "Milliseconds of a step by part, each compiled on its own:", "",
        "| batch | " + " | ".join(name.replace("_", " ") for name in parts) + " |",
        "|---" * (1 + len(parts)) + "|"]
    for batch, m in result["batches"].items():
        lines.append(f"| {batch} | " + " | ".join(f"{ms:.2f}" for ms in m["parts_ms"].values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    config = SMALL_100M if arguments.model == "small_100m" else named(MODELS, arguments.model, "--model")
    if config.attention != "mla":
        raise ConfigError(f"--model {arguments.model} has model.attention ({config.attention}): the parts of a step "
                          "are timed for mla; choose another preset")
    with standard_output_for_json(arguments.json) as write_json:
        runtime.start(MeshConfig(data=1))
        result = {"about": _about(arguments, config), **measure(config, arguments)}
        write_report(arguments.out, result, as_markdown(result))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
