"""Exchanges compiled for machines that are not here, against bytes counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign.collectives import Collective
from dsv3_jax.codesign.exchange import Case, Compiled, Program, compile_legs, sent
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.expert_parallel.exchange import Wire
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.presets import MODELS

# Every token goes to every node and to every device, so buffers of the balanced load are full to the last row.
MODEL = dataclasses.replace(MODELS["tiny"], hidden_size=1024, n_routed_experts=16, num_experts_per_tok=8, n_group=2,
                            topk_group=2)
TOKENS = 32
EVERYWHERE = RowsAToken(nodes=2, slow_copies=4, slow_rows=1, fast_rows=2 * 3)
OUT, HOME = 1024 + 4 * 8, 2 * 1024  # a float8 row with eight scales; a bf16 row


def case(transport: str, scale_out: int = 2, scale_up: int = 4) -> Case:
    return Case(MODEL, TOKENS, Topology(16, scale_out, scale_up), Wire("float8", transport=transport), 1.0)


@pytest.mark.parametrize("transport", ["padded", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("ragged", "pallas"))])
def test_bytes_in_the_program_are_those_of_the_rows(transport):
    """Where buffers are full, all transports send the same, over both networks: what the plan counts and no more."""
    compiled = compile_legs(case(transport), parse_pod("h100:2x4"))
    assert compiled.node_slots == 2 * TOKENS
    assert compiled.device_slots == 4 * 2 * TOKENS
    assert compiled.hops == 1
    assert [program.kernels > 0 for program in compiled.programs] == [False, *2 * [transport == "pallas"]]
    plan, out, home, total = sent(case(transport), compiled, EVERYWHERE)
    assert (out.slow, out.fast) == (out.least_slow, out.least_fast) == (TOKENS * OUT, 6 * TOKENS * OUT)
    assert (home.slow, home.fast) == (home.least_slow, home.least_fast) == (TOKENS * HOME, 6 * TOKENS * HOME)
    # An expert's number and its weight for each choice of each slot, and how many rows there are for each rank.
    assert plan.slow == TOKENS * 8 * (4 + 4) + 4
    assert plan.fast == 3 * (2 * TOKENS * 8 * (4 + 4) + 4)
    assert total.slow == plan.slow + out.slow + home.slow


def test_a_slice_has_no_slow_network():
    """On a torus of 2x2x2 a byte for another of its 8 chips crosses 12/7 links."""
    compiled = compile_legs(case("padded", 1, 8), parse_pod("v5p:2x2x2"))
    assert compiled.node_slots == 0
    assert compiled.hops == pytest.approx(12 / 7)
    _, out, home, _ = sent(case("padded", 1, 8), compiled, RowsAToken(1, 0, 0, 7))
    assert (out.slow, home.slow) == (0, 0)
    assert (out.fast, home.fast) == (out.least_fast, home.least_fast) == (7 * TOKENS * OUT, 7 * TOKENS * HOME)


def test_padded_exchanges_send_room_and_ragged_ones_rows():
    """Of a buffer of which a quarter is used."""
    def compiled(kind: str) -> Compiled:
        over = Collective(kind, ("scale_out",), 1, 0.0, 800.0, 0.0, 0.0, "")
        return Compiled([Program("dispatch", [over], 0, 0)], node_slots=2 * TOKENS, device_slots=0, hops=1)
    quarter = RowsAToken(nodes=1, slow_copies=1, slow_rows=0.25, fast_rows=0)
    for kind, expected in {"all-to-all": 800, "ragged-all-to-all": 200}.items():
        [out, _] = sent(case("padded"), compiled(kind), quarter)
        assert out.slow == expected
        assert out.least_slow == 0.25 * TOKENS * OUT
