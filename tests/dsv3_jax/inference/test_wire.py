"""Prefill and decode in processes of their own; one is killed under load."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference import wire
from dsv3_jax.inference.engine import Totals
from dsv3_jax.inference.handover import Handover, pack, unpack
from dsv3_jax.inference.request import Finish, Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.inference.wire import RouterServer, WorkerClient, WorkerStatus
from tests.dsv3_jax.inference.test_engine import answer_alone, requests

SIZES = Sizes(rows=8, pages=96, page_size=4, context=48)
KEY, HOST = b"a key", "127.0.0.1"


class Fake:
    """A worker that keeps what it hears; a decode worker says of each handover that it has it."""

    def __init__(self, name, send):
        self.name, self.send, self.heard = name, send, []

    def handle(self, header, handover):
        self.heard.append((header, handover))
        if header["kind"] == "read" and not self.heard[1:]:
            pages = (np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1),)
            self.send(header["deliver_to"], {"kind": "take", "job": header["job"], "attempt": header["attempt"],
                                             "from": self.name}, Handover(Request(np.array([1]), 2), 7, pages))
        if header["kind"] == "take":
            told = {"job": header["job"], "attempt": header["attempt"], "from": self.name}
            self.send(header["from"], {"kind": "placed", **told}, None)
            self.send("router", {"kind": "placed", "ids": [7], **told}, None)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def test_pages_go_from_worker_to_worker_and_a_lost_one_is_noticed():
    server = RouterServer((HOST, 0), KEY)
    decode = WorkerClient(server.address, KEY, lambda send: Fake("d", send), (HOST, 0))
    prefill = WorkerClient(server.address, KEY, lambda send: Fake("p", send))
    until(lambda: server.workers == ["d", "p"])
    ticket = server.router.submit(Request(np.array([5, 6], np.int32), 3, Sampling(temperature=0)))
    until(lambda: ticket.tokens == [7])
    until(lambda: [header["kind"] for header, _ in prefill.worker.heard] == ["read", "placed"])
    ((header, handover),) = decode.worker.heard
    assert (header["kind"], handover.first, handover.arrays_LJSx[0].shape) == ("take", 7, (2, 3, 4, 1))
    assert server.router.running == 1
    decode._router.close()
    until(lambda: server.workers == ["p"])
    assert decode.gone.wait(5)
    assert server.router.waiting == 1, "what it worked on waits for another"
    server.close()
    assert prefill.gone.wait(5)


def test_the_router_tells_how_its_workers_are(monkeypatch):
    """As an engine would, from what they say now and then; what a lost one has done still counts."""
    monkeypatch.setattr(wire, "SILENCE_S", 0.3)
    server = RouterServer((HOST, 0), KEY)
    assert "no decode worker" in str(server.error)
    counts = {"p": Totals(read_tokens=5), "d": Totals(new_tokens=7, accepted=[3])}
    clients = {name: WorkerClient(server.address, KEY, lambda send, name=name: Fake(name, send),
                                  (HOST, 0) if name == "d" else None,
                                  lambda name=name: WorkerStatus(40 if name == "d" else 50, 100, 8, counts[name]))
               for name in counts}
    until(lambda: server.error is None)
    assert (server.room, server.free_pages) == (40, 16)
    with pytest.raises(ConfigError, match=r"token 100 outside model.vocab_size \(100\)"):
        server.submit(Request(np.array([100], np.int32), 2))
    counts["d"].new_tokens = 9
    until(lambda: server.totals == Totals(read_tokens=5, new_tokens=9, accepted=[3]))
    clients["d"]._router.close()
    until(lambda: server.error is not None)
    assert "no decode worker" in str(server.error)
    assert server.totals.new_tokens == 9
    assert (server.room, server.free_pages) == (50, 8)
    server.close()


def test_who_does_not_know_the_key_is_not_heard():
    server = RouterServer((HOST, 0), KEY)
    with pytest.raises(AuthenticationError):
        Client(server.address, authkey=b"another")
    WorkerClient(server.address, KEY, lambda send: Fake("p", send))
    until(lambda: server.workers == ["p"])
    server.close()


def test_a_silent_worker_is_lost_and_a_living_one_is_not(monkeypatch):
    monkeypatch.setattr(wire, "SILENCE_S", 0.3)
    server = RouterServer((HOST, 0), KEY)
    WorkerClient(server.address, KEY, lambda send: Fake("living", send))
    silent = Client(server.address, authkey=KEY)
    silent.send_bytes(pack({"kind": "hello", "name": "silent", "address": None}))
    until(lambda: server.workers == ["living", "silent"])
    until(lambda: server.workers == ["living"])
    time.sleep(1)
    assert server.workers == ["living"], "it sends pings"
    assert unpack(silent.recv_bytes())[0] == {"kind": "ping"}
    server.close()


@pytest.mark.slow
def test_killing_the_decode_process_loses_no_request():
    """In the middle of answers; another process takes its place. Nothing is lost, repeated or changed."""
    server = RouterServer((HOST, 0), KEY)
    processes = {}

    def start(name, kind):
        script = Path(__file__).with_name("worker_process.py")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[3])}
        processes[name] = subprocess.Popen([sys.executable, str(script), name, kind, str(server.address[1]),
                                            KEY.decode()], env=environment)
    start("prefill", "prefill")
    start("first", "decode")
    start("second", "decode")
    try:
        until(lambda: len(server.workers) == 3, 300)
        asked = [dataclasses.replace(request, max_new_tokens=19) for request in requests(24, seed=13)]
        heard = [[] for _ in asked]
        tickets = [server.router.submit(request, lambda ids, _, n=n: heard[n].extend(ids))
                   for n, request in enumerate(asked)]
        until(lambda: sum(1 < len(ids) < 19 for ids in heard) >= 4, 60)
        processes["first"].kill()
        for ticket, ids, request in zip(tickets, heard, asked, strict=True):
            assert ticket.wait(120) == ids == answer_alone(request)
            assert ticket.finish is Finish.LENGTH
        assert server.router.totals.repeated >= 1
        assert server.workers == ["prefill", "second"]
    finally:
        server.close()
        for process in processes.values():
            process.kill()
            process.wait()
