"""Every schedule computes what the stages one after the other compute, in float64: losses to the bit, gradients too
but for the order of sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.codesign.hlo import Walk, matrix_flops, parse
from dsv3_jax.pipeline.account import stages_of
from dsv3_jax.pipeline.executor import FIRST_PART, LAST_PART, run_program
from dsv3_jax.pipeline.schedules import SCHEDULES, make
from dsv3_jax.pipeline.tables import make_tables
from dsv3_jax.precision.linear import linear

WIDTH, ROWS, VOCABULARY = 8, 4, 16


def layer(own, hidden):
    return hidden + jnp.tanh(linear(hidden * own["gain"], own["matrix"], None))


def first(own, shared, hidden, micro_batch):
    """Has weights of its own kind, and the table that the last stage has too."""
    hidden = layer(own, linear(shared["table"][micro_batch["tokens"]], shared["into"], None))
    return (hidden, jnp.zeros(())), jnp.zeros(())


def middle(own, shared, hidden, micro_batch):
    """A loss of its own, and an array for the backward that other kinds don't have."""
    del shared
    hidden = layer(own, hidden)
    halves = jnp.sin(hidden[:, :WIDTH // 2])
    return (hidden, 0.01 * jnp.sum(halves * halves)), jnp.zeros(())


def last(own, shared, hidden, micro_batch):
    logits = linear(layer(own, hidden), shared["table"].T, None)
    loss = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(ROWS), micro_batch["targets"]])
    return (jnp.zeros_like(hidden), loss), loss


KINDS = (first, middle, last)


def operands(stages: int, micro_batches: int):
    keys = jax.random.split(jax.random.key(1), 5)
    own = {"matrix": jax.random.normal(keys[0], (stages, WIDTH, WIDTH)) / 4,
           "gain": 1 + jax.random.normal(keys[1], (stages, WIDTH)) / 8}
    shared = {"table": jax.random.normal(keys[2], (VOCABULARY, WIDTH)), "into": jnp.eye(WIDTH) * 0.5,
              "not_used": jnp.ones((3,))}
    data = {name: jax.random.randint(key, (micro_batches, ROWS), 0, VOCABULARY)
            for name, key in zip(("tokens", "targets"), keys[3:], strict=True)}
    return own, shared, data


def in_turn(kinds, own, shared, data):
    """(losses [M], gradients), by one device, all of a micro-batch before the next."""
    def objective(weights, micro_batch):
        own, shared = weights
        hidden, total, loss = jnp.zeros((ROWS, WIDTH)), 0.0, None
        for stage, kind in enumerate(kinds):
            of_stage = jax.tree.map(lambda w, at=stage: w[at], own)
            (hidden, more), loss = KINDS[kind](of_stage, shared, hidden, micro_batch)
            total += more
        return total, loss

    def add(gradients, micro_batch):
        more, loss = jax.grad(objective, has_aux=True)((own, shared), micro_batch)
        return jax.tree.map(jnp.add, gradients, more), loss
    gradients, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (own, shared)), data)
    return losses, gradients


def program_on_ranks(schedule, kinds):
    """(weights [ranks, chunks, ...], shared, data) -> what each rank has in the end, one program."""
    program = make_tables([schedule], kinds)
    mesh = Mesh(np.array(jax.devices()[:schedule.ranks]), ("pipe",), axis_types=(AxisType.Auto,))

    def on_rank(own, shared, data):
        result = run_program(program, KINDS, jax.tree.map(lambda w: w[0], own), shared, data,
                             jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float64), accumulate=jnp.float64,
                             totals=jnp.zeros((schedule.micro_batches,)),
                             fold=lambda total, loss, micro_batch: total.at[micro_batch].add(loss))
        return jax.tree.map(lambda x: x[None], result)
    each, whole = PartitionSpec("pipe"), PartitionSpec()
    return jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=(each, whole, whole), out_specs=each, check_vma=False))


def in_pipeline(schedule, kinds, own, shared, data):
    """Losses and gradients by the schedule's ranks."""
    stages = np.array([stages_of(schedule, rank) for rank in range(schedule.ranks)])
    result = program_on_ranks(schedule, kinds)(jax.tree.map(lambda w: w[stages], own), shared, data)
    of_stages = jax.tree.map(lambda w, g: jnp.zeros_like(w).at[stages].add(g), own, result.own_gradients)
    shared_gradients = jax.tree.map(lambda g: g.sum(axis=0), result.shared_gradients)
    return jnp.sum(result.told, axis=(0, 1)), (of_stages, shared_gradients)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_losses_and_gradients_are_those_of_one_device(name, ranks):
    """Micro-batches: 20, but for 24 where they must be a multiple of 8 ranks."""
    micro_batches = 24 if (name, ranks) == ("interleaved", 8) else 20
    with jax.enable_x64(True):
        schedule = make(name, ranks, micro_batches)
        kinds = [0, *[1] * (schedule.stages - 2), 2]
        weights_and_data = operands(schedule.stages, micro_batches)
        losses, gradients = in_pipeline(schedule, kinds, *weights_and_data)
        expected_losses, expected = jax.jit(lambda *a: in_turn(kinds, *a))(*weights_and_data)
        np.testing.assert_array_equal(losses, expected_losses)
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
            # Sums of 20 and more terms of at most a few units, in another order.
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_a_walk_weighs_branches_by_how_often_they_run(name):
    """Matrix FLOPs of a rank, means over ranks, as the compiled program's walk counts them: of all micro-batches each
    product three times, in the forward, for inputs and for weights, over the ranks."""
    ranks, micro_batches = 4, 20
    with jax.enable_x64(True):
        schedule = make(name, ranks, micro_batches)
        kinds = [0, 1, 1, 2]
        own, shared, data = operands(schedule.stages, micro_batches)
        stages = np.array([stages_of(schedule, rank) for rank in range(ranks)])
        text = program_on_ranks(schedule, kinds).lower(jax.tree.map(lambda w: w[stages], own), shared,
                                                       data).compile().as_text()
    first, last = make_tables([schedule], kinds).shares()
    walk = Walk(parse(text), {}, {FIRST_PART: first, LAST_PART: last})
    counted = sum(times * matrix_flops(computation, line) for computation, line, times in walk.instructions())
    forward = 2 * ROWS * WIDTH * (schedule.stages * WIDTH + WIDTH + VOCABULARY)
    assert counted == pytest.approx(3 * forward * micro_batches / ranks, rel=1e-9)
    assert walk.unknown == []
