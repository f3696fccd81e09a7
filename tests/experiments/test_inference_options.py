"""Sizes of an engine that nobody named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.presets import MODELS
from experiments.inference_options import EngineOptions, engine_sizes


def on_devices(*free_bytes, model="deepseek_v3"):
    """DeepSeek-V3 on devices with so much memory left; None for one that does not tell."""
    devices = [SimpleNamespace(memory_stats=lambda free=free: None if free is None else {
        "bytes_limit": 80 * 10 ** 9, "bytes_in_use": 80 * 10 ** 9 - free}) for free in free_bytes]
    config = MODELS[model]
    return SimpleNamespace(model=config, cache="bf16", speculative=False, window=config.max_position_embeddings,
                           mesh=SimpleNamespace(local_devices=devices))


@pytest.mark.parametrize(("options", "free_bytes", "context", "pages"), [
    ({"rows": 16}, (20 * 10 ** 9,), 4096, 16 * 64),  # every row may be as long as it likes
    # 70,272 bytes a token (paper 1, table 1), 64 tokens a page, four fifths of the smaller device
    ({"rows": 256}, (20 * 10 ** 9, 10 * 10 ** 9), 4096, 8 * 10 ** 9 // (64 * 70_272)),
    ({"rows": 256}, (None,), 4096, 2 * 2 ** 30 // (64 * 70_272)),
    ({"rows": 1, "context": 100}, (20 * 10 ** 9,), 100, 2),
    ({"rows": 1, "pages": 7, "context": 400}, (0,), 400, 7),
])
def test_pages_are_enough_or_what_there_is_room_for(options, free_bytes, context, pages):
    sizes = engine_sizes(EngineOptions(**options), on_devices(*free_bytes))
    assert (sizes.context, sizes.pages) == (context, pages)


def test_a_small_window_is_the_context():
    assert engine_sizes(EngineOptions(), on_devices(None, model="quickstart")).context == 256


def test_too_little_memory_is_told():
    with pytest.raises(ConfigError, match=r"engine.context \(4096\) wants 64 pages of 4,497,408 bytes .* room for 17"):
        engine_sizes(EngineOptions(), on_devices(10 ** 8))
