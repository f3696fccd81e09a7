"""Every test runs on 8 simulated CPU devices."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here are small: LLVM's optimizations cost more time than they save.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

import jax
import pytest

# Compiled programs are shared between the test processes and between runs.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(__file__), ".cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Tracing makes objects by the million, and most live on: looking for garbage every 700 takes 5% of all time.
gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def eight_devices():
    devices = jax.devices()
    assert len(devices) == 8
    return devices
