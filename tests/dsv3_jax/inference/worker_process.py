"""A worker of tests/dsv3_jax/inference/test_wire.py: `worker_process.py NAME prefill|decode ROUTER_PORT KEY`."""

from __future__ import annotations

import sys

import jax

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.wire import WorkerClient
from dsv3_jax.inference.workers import DecodeWorker, PrefillWorker
from dsv3_jax.mesh import make_mesh
from tests.dsv3_jax.inference.test_engine import MODEL, weights
from tests.dsv3_jax.inference.test_wire import SIZES


def main() -> None:
    """Works until the router is gone."""
    name, kind, port, key = sys.argv[1:]
    on_mesh = ModelOnMesh(MODEL, make_mesh(MeshConfig(data=1), jax.devices()[:1]), precision="float32")
    prepared = on_mesh.prepare(*weights())
    router, secret = ("127.0.0.1", int(port)), key.encode()
    if kind == "prefill":
        client = WorkerClient(router, secret, lambda send: PrefillWorker(
            name, lambda push: Engine(on_mesh, prepared, SIZES, chunks=(32,), hand_over=push), send))
    else:
        engine = Engine(on_mesh, prepared, SIZES, chunks=(32,), receives=True)
        client = WorkerClient(router, secret, lambda send: DecodeWorker(name, engine, send), ("127.0.0.1", 0))
    with client.worker.engine:
        client.gone.wait()


if __name__ == "__main__":
    main()
