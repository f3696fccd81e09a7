"""Names of pods: what they mean, and what is refused before anything compiles."""

from __future__ import annotations

import pytest

from dsv3_jax.codesign.pods import default_mesh, parse_pod, pod_devices
from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.presets import MODELS


@pytest.mark.parametrize(("text", "domains", "size"), [
    ("h800:256x8", 256, 8), ("h100:8x8", 8, 8), ("gb200:8x72", 8, 72), ("v5p:8x8x8", 1, 512),
    ("v5p:4x4x4,slices=4", 4, 64), ("v6e:16x16", 1, 256), ("tpu7x:8x8x8", 1, 1024)])
def test_shapes(text, domains, size):
    pod = parse_pod(text)
    assert (pod.domains, pod.devices_per_domain, pod.devices) == (domains, size, domains * size)
    assert str(pod) == text


@pytest.mark.parametrize(("text", "message"), [
    ("h800", r"not HARDWARE:SHAPE: write for example h800:256x8"),
    ("h900:2x8", r"hardware h900 is unknown; did you mean h\d00"),
    ("h800:2x16", r"16 GPUs a node, but NVLink 4 joins at most 8 h800: write h800:NODESx8"),
    ("h800:2x8x4", r"a GPU pod is h800:NODESxGPUS"),
    ("h800:2x8,slices=2", r"a GPU pod is h800:NODESxGPUS"),
    ("v5p:16x16", r"a v5p slice has 3 dimensions, such as v5p:4x4x4"),
    ("v6e:32x32", r"1024 chips, but a v6e slice has at most 256: use several smaller slices"),
    ("v5p:0x4x4", r"every size must be at least 1")])
def test_bad_names(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_pod(text)


def test_a_shape_that_the_compiler_refuses():
    with pytest.raises(ConfigError, match=r"--pod v5p:3x3x3: the tpu compiler has no such topology: .*not divisible"):
        pod_devices(parse_pod("v5p:3x3x3"))


def test_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs libtpu: pip install 'dsv3-jax\[aot\]'"):
        pod_devices.__wrapped__(parse_pod("v5p:2x2x1"))  # other tests of this process may have asked before


@pytest.mark.parametrize(("model", "pod", "scale_out", "scale_up"), [
    ("deepseek_v3", "h800:256x8", 8, 8), ("deepseek_v3", "gb200:8x72", 8, 8), ("moonlight_16b", "v6e:8x8", 1, 64),
    ("deepseek_v3", "v5p:8x8x8", 1, 256), ("deepseek_v3", "v5p:4x4x4,slices=4", 4, 64)])
def test_expert_axes_come_from_the_pod(model, pod, scale_out, scale_up):
    mesh = default_mesh(MODELS[model], parse_pod(pod), MeshConfig())
    assert (mesh.scale_out, mesh.scale_up) == (scale_out, scale_up)


def test_expert_axes_that_were_asked_for_stay():
    asked = MeshConfig(scale_out=2, scale_up=4)
    assert default_mesh(MODELS["deepseek_v3"], parse_pod("h800:256x8"), asked) is asked
