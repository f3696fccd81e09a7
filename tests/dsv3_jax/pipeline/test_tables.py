"""Tables, by following what they move: every read finds what it must, and buffers are as large as the schedule says."""

from __future__ import annotations

import itertools

import pytest

from dsv3_jax.pipeline.account import stages_of
from dsv3_jax.pipeline.schedule import peak_activations
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make, with_fewer_put_off
from dsv3_jax.pipeline.tables import make_tables


def kinds_of_stages(stages):
    return [0, *[1] * (stages - 2), 2]


def follow(schedule, program, number=0):
    """Runs the tables on names instead of arrays; returns (micro-batch, stage) of the forwards, backwards and weights'
    parts in the order in which they ran."""
    kinds, held = kinds_of_stages(schedule.stages), [stages_of(schedule, rank) for rank in range(schedule.ranks)]
    buffers = {(name, rank): {} for name in ("input", "gradient", "stash", "put_off") for rank in range(schedule.ranks)}
    done = {"F": [], "I": [], "W": []}
    tables = program.tables
    for tick in range(program.ticks[number]):
        sent = {}
        for rank in range(schedule.ranks):
            def row(name, rank=rank, tick=tick):
                return getattr(tables, name)[number, tick, rank].tolist()
            forward, backward = program.branches[row("branch")]
            stash, kept = buffers["stash", rank], None
            if forward is not None:
                stage, m = held[rank][row("forward_chunk")], row("forward_micro_batch")
                assert kinds[stage] == forward
                assert stage == 0 or buffers["input", rank][row("forward_input")] == (m, stage - 1)
                done["F"].append((m, stage))
                sent["output", rank], kept = (m, stage), (m, stage)
            if backward is not None:
                stage = held[rank][row("backward_chunk")]
                m, of = stash[row("backward_stash")]
                assert (of, kinds[stage]) == (stage, backward)
                if stage < schedule.stages - 1:
                    assert buffers["gradient", rank][row("backward_gradient")] == (m, stage + 1)
                done["I"].append((m, stage))
                sent["gradient", rank] = (m, stage)
                buffers["put_off", rank][row("backward_put_off")] = (m, stage)
            if row("weights_kind") >= 0:
                work = buffers["put_off", rank][row("weights_put_off")]
                assert stash[row("weights_stash")] == work
                assert (held[rank][row("weights_chunk")], row("weights_kind")) == (work[1], kinds[work[1]])
                done["W"].append(work)
            if kept is not None:
                stash[row("forward_stash")] = kept
        for rank, (name, arrives, shifts) in itertools.product(range(schedule.ranks), (
                ("output", tables.output_arrives, program.output_shifts),
                ("gradient", tables.gradient_arrives, program.gradient_shifts))):
            buffer = buffers["input" if name == "output" else name, rank]
            for shift, slot in zip(shifts, arrives[number, tick, rank].tolist(), strict=True):
                buffer[slot] = sent.get((name, (rank - shift) % schedule.ranks))
    return done, buffers


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 10), (8, 20), (8, 33)])
def test_every_read_finds_what_it_must(name, ranks, micro_batches):
    schedule = make(name, *fitting_sizes(name, ranks, micro_batches))
    program = make_tables([schedule], kinds_of_stages(schedule.stages))
    done, buffers = follow(schedule, program)
    everything = sorted(itertools.product(range(schedule.micro_batches), range(schedule.stages)))
    assert all(sorted(works) == everything for works in done.values())
    assert program.slots.stash == max(peak_activations(schedule))
    for kind, slots in (("stash", program.slots.stash), ("put_off", program.slots.put_off)):
        used = {slot for rank in range(schedule.ranks) for slot in buffers[kind, rank]}
        assert used <= set(range(slots))


def test_several_schedules_share_a_program():
    whole, less = make("dualpipe", 4, 12), make("1f1b", 4, 5)
    program = make_tables([whole, less], kinds_of_stages(4))
    for number, schedule in enumerate((whole, less)):
        # 1F1B works on stages that DualPipe's ranks have, by their numbers there.
        done, _ = follow(schedule._replace(slots=whole.slots) if schedule is less else schedule, program, number)
        assert len(done["W"]) == 4 * schedule.micro_batches
    assert program.slots.stash == 5


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("most", [0, 1, 2])
def test_fewer_are_put_off(name, most):
    schedule = make(name, 8, 20)
    fewer = with_fewer_put_off(schedule, most)
    program = make_tables([fewer], kinds_of_stages(schedule.stages))
    done, _ = follow(fewer, program)
    assert len(done["W"]) == schedule.stages * 20
    # One more for a backward whose weights' part follows at once.
    assert program.slots.put_off == most + 1 < make_tables([schedule], kinds_of_stages(schedule.stages)).slots.put_off
    assert max(peak_activations(fewer)) <= max(peak_activations(schedule))


def test_shares_of_ticks():
    """Of 1F1B on 2 ranks with 3 micro-batches: 8 ticks, on each rank 3 with a forward and 3 with a whole backward."""
    program = make_tables([make("1f1b", 2, 3)], [0, 1])
    first, last = program.shares()
    assert program.ticks == (8,)
    assert {branch: share for branch, share in zip(program.branches, first, strict=True)} == {
        (None, None): 2 / 8, (0, None): 3 / 16, (1, None): 3 / 16, (None, 0): 3 / 16, (None, 1): 3 / 16}
    assert last == [10 / 16, 3 / 16, 3 / 16]
