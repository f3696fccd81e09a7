"""Named, complete models and runs. Sizes are those of the published `config.json` of each model."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    Precision,
    Recompute,
    ReportConfig,
    RopeScaling,
    RunConfig,
    ScheduleConfig,
)

# Initialisation 0.006 is paper 2's (section 4.2); the published config.json files print 0.02, a library default.
_DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
    routed_scaling_factor=2.5, mtp_hidden="post_norm", max_position_embeddings=163840,
    rope_scaling=RopeScaling())

_DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
    num_hidden_layers=60, first_k_dense_replace=1, num_attention_heads=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, n_group=8, topk_group=3,
    scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0,
    masked_group_score="0", aux_loss_alpha=0.001, num_nextn_predict_layers=0,
    max_position_embeddings=163840, rope_scaling=RopeScaling())

_DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16,
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
    aux_loss_alpha=0.001, num_nextn_predict_layers=0,
    max_position_embeddings=163840, rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707))

_MOONLIGHT_16B = ModelConfig(
    vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
    num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16,
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, routed_scaling_factor=2.446,
    aux_loss_alpha=0.001, num_nextn_predict_layers=0,
    max_position_embeddings=8192, rope_theta=50000.0, rms_norm_eps=1e-5, initializer_range=0.02)

_KIMI_K2 = ModelConfig(
    vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, first_k_dense_replace=1, num_attention_heads=64,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=384, n_shared_experts=1, num_experts_per_tok=8, routed_scaling_factor=2.827,
    aux_loss_alpha=0.001, num_nextn_predict_layers=0,
    max_position_embeddings=131072, rope_theta=50000.0,
    rope_scaling=RopeScaling(factor=32.0, beta_fast=1.0, beta_slow=1.0))

# Every architectural part of V3 at a size that two CPU cores train in minutes.
_QUICKSTART = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, moe_intermediate_size=128,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=2,
    q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, max_position_embeddings=256, initializer_range=0.06)

# The same with other attention, for experiments/kv_cache.py. Of four heads of 32 two share keys and values, or all do:
# the cache has 128 values a token and layer, or 64, where the latent's has 64.
_QUICKSTART_GQA = dataclasses.replace(_QUICKSTART, attention="gqa", num_attention_heads=4, num_key_value_heads=2,
                                      head_dim=32)
_QUICKSTART_MQA = dataclasses.replace(_QUICKSTART_GQA, attention="mqa", num_key_value_heads=None)

_TINY = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=2,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, max_position_embeddings=128, initializer_range=0.02)

MODELS: dict[str, ModelConfig] = {
    "deepseek_v3": _DEEPSEEK_V3, "deepseek_v2": _DEEPSEEK_V2, "deepseek_v2_lite": _DEEPSEEK_V2_LITE,
    "moonlight_16b": _MOONLIGHT_16B, "kimi_k2": _KIMI_K2, "quickstart": _QUICKSTART,
    "quickstart_gqa": _QUICKSTART_GQA, "quickstart_mqa": _QUICKSTART_MQA, "tiny": _TINY,
}


class ServingDeployment(NamedTuple):
    """Devices that share one copy of a model's experts, and slots for replicas of them (`expert_parallel.replicas`)."""

    devices: int
    nodes: int
    redundant: int
    """Slots beyond the model's experts."""
    by_group: bool
    """Whether replicas stay on their router group's node."""
    hardware: str = "h800"
    context: int = 1
    """Devices that share prompts (`MeshConfig.context`), inside a node."""

    @property
    def pod(self) -> str:
        """As `codesign.pods.parse_pod` reads it."""
        return f"{self.hardware}:{self.nodes}x{self.devices // self.nodes}"


DEPLOYMENTS = {"prefill": ServingDeployment(devices=32, nodes=4, redundant=32, by_group=True, context=4),
               "decode144": ServingDeployment(devices=144, nodes=18, redundant=32, by_group=False),
               "decode320": ServingDeployment(devices=320, nodes=40, redundant=64, by_group=False),
               "decode72": ServingDeployment(devices=72, nodes=1, redundant=32, by_group=False, hardware="gb200")}
"""DeepSeek-V3's: prefill on 4 nodes and decode on 40 (paper 2, section 3.4). Of prefill, four devices share a prompt:
the paper splits heads over them and tokens outside of attention; here tokens are split in attention too, and latents
travel instead of hidden states. Decode's 64 devices for redundant and shared experts hold replicas. Decode on 18, as
served later (DeepSeek's open-infra-index of February 2025), and the rack of 72 that paper 1 calculates with (section
2.3.2)."""


_BATCH = 15360, 3072
"""DeepSeek-V3's: sequences, and those that it grows from."""


def _pretraining(model: ModelConfig) -> RunConfig:
    """Paper 2's recipe (section 4.2): 14.8T tokens in sequences of 4096, batch 3072 growing to 15360."""
    return RunConfig(
        model=model,
        batch=BatchConfig(sequences=_BATCH[0], sequence_length=4096, micro_batches=15, ramp_from=_BATCH[1],
                          ramp_until=469 / 14800),
        data=DataConfig(tokenizer="deepseek", fim_rate=0.1),
        checkpoint=CheckpointConfig(every=500),
        report=ReportConfig(evaluate_every=500),
        steps=242_800)


RUNS: dict[str, RunConfig] = {
    **{name: _pretraining(MODELS[name]) for name in
       ("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "kimi_k2")},
    "quickstart": RunConfig(
        model=_QUICKSTART,
        batch=BatchConfig(sequences=8, sequence_length=128),
        schedule=ScheduleConfig(peak_learning_rate=5e-3, floor_learning_rate=2.5e-4, final_learning_rate=1e-4,
                                warmup_steps=30, constant_until=0.4, cosine_until=0.97, floor_until=0.99,
                                bias_speed=0.01),
        data=DataConfig(tokenizer="bpe", training_from_year=1930),
        checkpoint=CheckpointConfig(every=350),
        report=ReportConfig(evaluate_every=700, sample_every=700),
        steps=1400, precision="float32", recompute="none"),
    "tiny": RunConfig(
        model=_TINY,
        batch=BatchConfig(sequences=8, sequence_length=64),
        schedule=ScheduleConfig(peak_learning_rate=3e-3, warmup_steps=5, constant_until=1.0, cosine_until=1.0,
                                floor_until=1.0, late_mtp_from=1.0, bias_until=1.0),
        optimizer=OptimizerConfig(moment_dtype="float32", ema_decay=0.99),
        data=DataConfig(tokenizer="bytes", validation_from_year=2025),
        checkpoint=CheckpointConfig(every=10),
        report=ReportConfig(evaluate_every=0),
        steps=20, precision="float32"),
}
RUNS.update({name: dataclasses.replace(RUNS["quickstart"], model=MODELS[name])
             for name in ("quickstart_gqa", "quickstart_mqa")})


class Layout(NamedTuple):
    """A pod and how a model lies on it."""

    pod: str
    mesh: MeshConfig
    micro_batches: int
    recompute: Recompute
    precision: Precision = "bf16"
    pipeline: PipelineConfig = PipelineConfig()
    batch: tuple[int, int] = _BATCH


# DeepSeek-V3 with the paper's batch of 15,360 sequences of 4096, each compiled for its pod by the pod's own compiler
# (experiments/results/pods). Experts over 64 devices as in paper 2, section 3.2, one group a node on GPU. "pipelined"
# is the paper's own layout: 16 ranks of DualPipe, ZeRO-1 over 2 x 64 devices, one sequence a device in each of 120
# micro-batches, float8. Its weights' parts are not put off: each would keep 7 GiB. The others shard fully instead; on
# 2,048 devices two then share a sequence, 7.5 being no number of sequences. "dual" overlaps halves of a micro-batch
# instead, each of one sequence a device; on 2,048 devices the batch is 16,384 for that.
LAYOUTS: dict[str, Layout] = {
    "deepseek_v3_h800": Layout("h800:256x8", MeshConfig(data=32, scale_out=8, scale_up=4, context=2, zero="full"), 5,
                               "experts"),
    "deepseek_v3_h800_pipelined": Layout("h800:256x8", MeshConfig(pipe=16, data=2, scale_out=8, scale_up=8), 120,
                                         "full", "fp8", PipelineConfig("dualpipe", put_off=0)),
    "deepseek_v3_h800_dual": Layout("h800:256x8", MeshConfig(data=32, scale_out=8, scale_up=8, zero="full", dual=True),
                                    4, "experts", "fp8", batch=(16384, 4096)),
    "deepseek_v3_v5p": Layout("v5p:8x8x8", MeshConfig(data=8, scale_up=64, zero="full"), 15, "experts"),
    "deepseek_v3_v5p_dual": Layout("v5p:8x8x8", MeshConfig(data=8, scale_up=64, zero="full", dual=True), 15,
                                   "experts"),
    "deepseek_v3_tpu7x": Layout("tpu7x:8x8x8", MeshConfig(data=16, scale_up=64, zero="full"), 15, "experts"),
}
RUNS.update({name: dataclasses.replace(RUNS["deepseek_v3"], mesh=layout.mesh, recompute=layout.recompute,
                                       precision=layout.precision, pipeline=layout.pipeline,
                                       batch=dataclasses.replace(
                                           RUNS["deepseek_v3"].batch, sequences=layout.batch[0],
                                           ramp_from=layout.batch[1], micro_batches=layout.micro_batches))
             for name, layout in LAYOUTS.items()})
