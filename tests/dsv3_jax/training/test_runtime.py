"""What is set before JAX starts."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

from dsv3_jax.training import runtime


@pytest.mark.parametrize(("variables", "several"), [
    ({}, False), ({"SLURM_STEP_NUM_TASKS": "1"}, False), ({"SLURM_STEP_NUM_TASKS": "16"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True)])
def test_schedulers_are_noticed(variables, several, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS",
                 "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runtime._in_cluster() == several


@pytest.mark.parametrize(("extra", "platforms", "warns"), [
    ("cuda13", None, True), ("tpu", None, True), (None, None, False), ("cuda13", "cpu", False)])
def test_an_idle_accelerator_is_reported(extra, platforms, warns, monkeypatch):
    monkeypatch.setattr(runtime, "_accelerator", lambda: extra)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(runtime.jax, "config", type("Config", (), {"jax_platforms": platforms}))
    warning = runtime.idle_accelerator()
    assert bool(warning) == warns
    assert not warns or f"dsv3-jax[{extra}]" in warning


def test_casts_to_bf16_round_where_they_are_kept():
    """XLA on CPU drops a cast and its inverse unless told not to."""
    program = """
import jax, jax.numpy as jnp
from dsv3_jax.config import MeshConfig
from dsv3_jax.training import runtime
runtime.start(MeshConfig(simulate_devices=2), keep_casts=True)
print(jax.device_count(), jax.jit(lambda x: (x * 3).astype(jnp.bfloat16).astype(jnp.float32))(1 + 2.0 ** -7))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # 3 + 3/128 lies between 3 + 2/128 and 3 + 4/128, and rounds to the one whose last bit is even.
    assert done.stdout.split() == ["2", "3.03125"]
