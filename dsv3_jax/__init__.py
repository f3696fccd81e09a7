"""DeepSeek-V3's hardware-aware co-design in JAX: the model, its training and its parallelism."""
