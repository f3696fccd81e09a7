"""Conversions hold a slice, not the model: peak resident memory as the operating system counts it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop.names import published_tensors
from dsv3_jax.interop.safetensors_writer import SafetensorsWriter
from dsv3_jax.interop.store import row_blocks
from dsv3_jax.presets import MODELS
from tests.published import small_config_json

ROOT = Path(__file__).parents[3]
CONSTANT = 128e6
"""What a conversion may hold beside two of its largest tensors: blocks of rows in float32 and their copies, commits of
Orbax's database and its index, and pages of the allocator. Measured with 397 MB of float8, whose largest tensor has
4.2 MB: 68 MB to Orbax, 36 MB from there to bfloat16 safetensors."""
PER_TENSOR = 2048
"""And for each tensor: its names, shapes, types and places in source, target and the table between them. V3 in float8
has 91,991; as many of 37 bytes each, with the constant's part, took 146 MB to Orbax (200 MB if every third commits) and
202 MB back."""

# The baseline is the peak after the imports, so that jaxlib and Orbax do not count.
_SCRIPT = """
import sys
from pathlib import Path
from dsv3_jax.interop.convert import convert, open_store
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
convert(open_store(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], sys.argv[4], shard_bytes=int(100e6))
print(peak() - before)
"""


def _synthetic(folder: Path, vocab: int, experts: int, width: int, layers: int = 3) -> tuple[int, ...]:
    """A float8 model with random codes, and (its tensors, its bytes, those of its largest tensor). Written by blocks
    as well."""
    config = dataclasses.replace(MODELS["tiny"], vocab_size=vocab, hidden_size=width, moe_intermediate_size=width,
                                 n_routed_experts=experts, num_hidden_layers=layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_config_json(config, True)))
    specs = published_tensors(config, "float8")
    writer = SafetensorsWriter(folder, {spec.name: (spec.shape, spec.dtype) for spec in specs}, int(100e6))
    random = np.random.default_rng(0)
    for spec in specs:
        for rows in row_blocks(spec.shape):
            shape = (rows.stop - rows.start, *spec.shape[1:])
            if spec.dtype == ml_dtypes.float8_e4m3fn:
                values = random.integers(0, 127, shape, np.uint8).view(spec.dtype)
            else:
                values = random.random(shape, np.float32).astype(spec.dtype)
            writer.write(spec.name, rows.start, values)
    writer.finish()
    return len(specs), sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)


def _peaks(tmp_path: Path, steps: list[tuple[str, str]], **sizes: int) -> tuple[int, int, int, list[int]]:
    """Tensors of the model, its bytes, those of its largest tensor, and the peak of each of a chain of conversions."""
    count, total, largest = _synthetic(tmp_path / "0", **sizes)
    peaks = []
    for number, (kind, fmt) in enumerate(steps):
        command = [sys.executable, "-c", _SCRIPT, tmp_path / f"{number}", tmp_path / f"{number + 1}", kind, fmt]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    return count, total, largest, peaks


def test_small(tmp_path):
    """The model is larger than what the conversion may take, so holding all of it would fail."""
    steps = [("orbax", "same"), ("published", "bfloat16")]
    _, total, largest, peaks = _peaks(tmp_path, steps, vocab=512, experts=24, width=1024)
    assert total > 2 * largest + CONSTANT
    assert largest < 10e6
    assert max(peaks) < 2 * largest + CONSTANT, (peaks, largest, total)


@pytest.mark.slow
def test_2_gigabytes(tmp_path):
    steps = [("orbax", "same"), ("published", "bfloat16"), ("published", "float8")]
    _, total, largest, peaks = _peaks(tmp_path, steps, vocab=65536, experts=96, width=1536)
    assert total > 2e9
    assert max(peaks) < 2 * largest + CONSTANT, (peaks, largest, total)


@pytest.mark.slow
def test_as_many_tensors_as_v3_has(tmp_path):
    steps = [("orbax", "same"), ("published", "same")]
    count, _, largest, peaks = _peaks(tmp_path, steps, vocab=512, experts=256, width=8, layers=60)
    assert count > 90_000
    assert max(peaks) < 2 * largest + CONSTANT + PER_TENSOR * count, (peaks, largest, count)
