"""The dense models that paper 1 measures DeepSeek's against, as far as memory and FLOPs depend on them."""

from __future__ import annotations

from typing import NamedTuple

from dsv3_jax.codesign.counting import attention_flops_per_token


class DenseModel(NamedTuple):
    """A decoder with grouped-query attention and SwiGLU; sizes as in its published config.json. Biases and norms, less
    than 1e-4 of the weights, are left out."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all but the embedding table."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; embedding and head are two tables in all of these models."""
        return self.matrix_weights + self.vocabulary * self.hidden

    def cache_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Keys and values of one token in all layers: 2 * kv_heads * head_dim * layers values, in bf16 by default
        (paper 1, section 2.1.2 and table 1)."""
        return 2 * self.kv_heads * self.head_dim * self.layers * bytes_per_value

    def training_flops_per_token(self, sequence_length: int, causal: bool = True) -> float:
        """Forward and backward FLOPs of one token, by the formula of `counting.training_flops_per_token`."""
        keys = sequence_length / 2 if causal else sequence_length
        attention = attention_flops_per_token(self.heads, self.head_dim, self.head_dim, keys)
        return 6.0 * self.matrix_weights + 3.0 * attention * self.layers


DENSE_MODELS: dict[str, DenseModel] = {
    # Qwen/Qwen2.5-72B
    "qwen2.5_72b": DenseModel("Qwen-2.5 72B", 80, 8192, 29568, 64, 8, 128, 152064),
    # Qwen/Qwen-72B: as many heads of keys and values as of queries; its config.json counts both halves of SwiGLU,
    # 49,152, as intermediate_size
    "qwen_72b": DenseModel("Qwen 72B", 80, 8192, 24576, 64, 64, 128, 152064),
    # meta-llama/Llama-3.1-70B
    "llama3.1_70b": DenseModel("LLaMA-3.1 70B", 80, 8192, 28672, 64, 8, 128, 128256),
    # meta-llama/Llama-3.1-405B
    "llama3.1_405b": DenseModel("LLaMA-3.1 405B", 126, 16384, 53248, 128, 8, 128, 128256),
}
