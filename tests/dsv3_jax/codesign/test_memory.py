"""Memory that is calculated against memory that is: compiled programs' reports, residuals of gradients, caches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.memory import abstract_mesh, cache_bytes, kept_activations, serving_memory, training_memory
from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig, ModelConfig, RunConfig
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.nn.model import split_model
from dsv3_jax.precision.recipe import compute_weights
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training.loss import training_losses
from tests.dsv3_jax.codesign.pod_reports import REPORTS, Report

STATE = ("weights", "optimizer", "average", "compute_weights", "summed_gradients")


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_state_of_compiled_programs_to_the_byte(report: Report):
    """And what is kept of activations is a part, half of it or so, of what the programs hold."""
    memory = training_memory(report.config, report.told["devices"])
    found = report.told["memory_by_kind"]
    assert {kind: getattr(memory, kind) for kind in STATE} == {kind: found[kind] for kind in STATE}
    assert 0.4 < memory.kept_activations / found["activations_and_buffers"] < 0.6
    assert memory.total < report.told["peak_bytes"]


def test_state_by_hand():
    """Master weights of 4 bytes and two moments of 2, spread over 64 devices but for what does not divide; compute
    weights of 2 bytes, 4 of routers, are gathered once a step, all but the experts."""
    run = dataclasses.replace(RUNS["deepseek_v3"], mesh=MeshConfig(scale_out=8, scale_up=8))
    memory, count = training_memory(run, 64), count_parameters(run.model)
    total, gathered = count.main + count.mtp, 2 * (count.main + count.mtp + 59 * 256 * 7168)
    experts = 2 * 59 * 256 * 3 * 7168 * 2048
    assert memory.weights == memory.summed_gradients == pytest.approx(4 * total / 64, rel=1e-3)
    assert memory.optimizer == pytest.approx(4 * total / 64, rel=1e-3)
    assert memory.compute_weights == pytest.approx(experts / 64 + gathered - experts, rel=1e-3)
    assert memory.average == 0


MODEL = dataclasses.replace(MODELS["tiny"], num_hidden_layers=8, hidden_size=128, moe_intermediate_size=128,
                            v_head_dim=64, num_nextn_predict_layers=0)
GQA = dataclasses.replace(MODEL, attention="gqa", num_key_value_heads=1, head_dim=64)


@pytest.mark.parametrize(("model", "precision", "recompute"), [
    (MODEL, "bf16", "paper"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (MODEL, "fp8", "paper"), (MODEL, "bf16", "experts"), (MODEL, "bf16", "full"), (GQA, "bf16", "paper"),
        (GQA, "fp8", "experts")))],
    ids=lambda value: value.attention if isinstance(value, ModelConfig) else value)
def test_kept_activations_are_the_residuals_of_the_gradient(model, precision, recompute):
    """Of twice the sequences and twice the layers, so that what does not grow with both drops out. The plan's integers
    are not calculated: up to 4 of each choice of a token, and a few more."""
    def run(sequences: int, layers: int) -> RunConfig:
        deeper = dataclasses.replace(model, num_hidden_layers=layers)
        return RunConfig(deeper, batch=BatchConfig(sequences=sequences, sequence_length=64), precision=precision,
                         recompute=recompute)

    def growth(size) -> int:
        return size(run(16, 12)) - size(run(16, 6)) - size(run(8, 12)) + size(run(8, 6))
    found, predicted = growth(_residual_bytes), growth(lambda config: kept_activations(config, 1))
    plan = 8 * 64 * 6 * 4 * (4 * model.num_experts_per_tok + 4)
    assert predicted <= found <= predicted + plan
    assert predicted > plan / 2


def _residual_bytes(config: RunConfig) -> int:
    """What the gradient's forward hands to its backward, weights and all."""
    structure, params, router_bias = split_model(config.model, precision=config.precision)
    weights = compute_weights(params, config.precision)

    def forward(weights, tokens):
        def loss(weights):
            losses, _ = training_losses(nnx.merge(structure, weights, router_bias), tokens, config.execution)
            return losses.main
        return jax.vjp(loss, weights)[1]
    tokens = jax.ShapeDtypeStruct((config.batch.sequences, config.batch.sequence_length + 1), jnp.int32)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(forward, weights, tokens)))


def test_kept_in_float8_by_hand():
    """Of 6,144 tokens: two residuals and the projections in bf16, E5M6 after attention, E4M3 before SwiGLU, with a
    float32 scale for 128 values; the prediction module's embedding."""
    run = dataclasses.replace(RUNS["deepseek_v3_h800"], precision="fp8")
    common = 2 * (2 * 7168 + 1536 + 512 + 64) + 16384 * 3 / 2 + 16384 / 32
    dense, shared = 2 * 18432 * (1 + 1 / 32), 2 * 2048 * (1 + 1 / 32)
    assert kept_activations(run, 2048) == 6144 * (62 * common + 3 * dense + 59 * shared + 2 * 7168)


def test_less_is_kept_with_more_recomputation():
    run = dataclasses.replace(RUNS["deepseek_v3_h800"], recompute="paper")
    paper, experts, full = (kept_activations(dataclasses.replace(run, recompute=level), 2048)
                            for level in ("paper", "experts", "full"))
    assert paper > 3 * experts > 12 * full
    # Rows as dispatched and before SwiGLU, with the room of 1.5 and tiles.
    assert paper - experts == pytest.approx(59 * 2 * (7168 + 4096) * 1.5 * 6144 * 8, rel=0.01)


def test_what_is_not_modelled_is_refused():
    with pytest.raises(ConfigError, match=r"recompute \(none\) is not modelled"):
        kept_activations(dataclasses.replace(RUNS["deepseek_v3_h800"], recompute="none"), 2048)
    with pytest.raises(ConfigError, match=r"\(1\*32\*8\*4\*2=2048\) must be the 1024 devices"):
        abstract_mesh(RUNS["deepseek_v3_h800"].mesh, 1024)


@pytest.mark.parametrize(("numbers", "message"), [
    ((0, 1, 1), r"expert_devices \(0\)"), ((-8, 1, 1), r"expert_devices \(-8\)"), ((8, 0, 1), r"rows \(0\)"),
    ((8, 1, -1), r"tokens \(-1\)"), ((8, 1, 1, 0), r"weight_bytes \(0\)")])
def test_nonsense_is_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        serving_memory(MODELS["deepseek_v3"], *numbers)


@pytest.mark.parametrize("kind", ["bf16", "float32", "float8", "int8"])
@pytest.mark.parametrize("model", [
    MODELS["deepseek_v3"], MODELS["deepseek_v2_lite"], GQA, dataclasses.replace(MODELS["tiny"], attention_window=8)],
    ids=["v3", "v2_lite", "gqa", "window"])
def test_cache_as_allocated(model: ModelConfig, kind):
    """Arrays of the cache but for the rows' lengths; V3's for 4 rows of 32 tokens are 9 MB."""
    for mtp in (False, True):
        storage = LatentCache.empty(model, rows=4, capacity=32, kind=kind, mtp=mtp).storage
        assert cache_bytes(model, 4, 32, kind, mtp) == sum(x.nbytes for x in jax.tree.leaves(storage))


def test_serving_by_hand():
    """Paper 2's decoding (section 3.4): one expert of every layer a device. Embedding and head have 2 bytes."""
    held = serving_memory(MODELS["deepseek_v3"], 320, rows=2, tokens=1000)
    count = count_parameters(MODELS["deepseek_v3"])
    assert held.experts == 58 * 3 * 7168 * 2048
    assert held.other_weights == count.main - 256 * held.experts + 2 * 129280 * 7168
    assert held.cache == 2 * 1000 * 70272
    assert serving_memory(MODELS["deepseek_v3"], 72, 1, 1).experts == 4 * held.experts
