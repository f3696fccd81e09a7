"""Runs any schedule on the mesh axis `pipe`: one program for all ranks, which look up what to do in tables.

A tick has three parts: a forward, a backward for inputs, or both at once, so that each can cover the other's
communication; the sends of what they made to other ranks; and the weights' part of a backward, which covers the sends.
(Of a backward for inputs also come those gradients of weights that nothing marks, see `precision.deferral`.)
What a backward needs is kept without the weights, which are there anyway. Stages of different kinds share the buffers:
arrays of the same shape and type take each other's places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.interpreters.partial_eval import dce_jaxpr

from dsv3_jax.expert_parallel.overlap import Pull, Task, side_by_side
from dsv3_jax.pipeline.tables import Program
from dsv3_jax.precision.deferral import Halves, split

AXIS = "pipe"
LOOP, FIRST_PART, LAST_PART = "pipeline", "first_part", "last_part"
"""Names in the program of the loop over ticks, and of the choices that the parts of a tick make."""

Stage = Callable[[Any, Any, jax.Array, Any], tuple[tuple[jax.Array, jax.Array], Any]]
"""(weights of the stage, weights that all stages see, hidden, micro-batch) -> ((hidden, loss), what it tells).

The first stage ignores the hidden it gets, and the last gives one that depends on nothing. Losses, float scalars, are
summed. What is told has the same shapes in all kinds of stages, and no gradient."""


class Result(NamedTuple):
    """Of one rank."""

    own_gradients: Any
    """Like the weights of the rank's stages, [chunks, ...], sums over micro-batches in the type of `accumulate`."""
    shared_gradients: Any
    """This rank's part: the sum over ranks is the gradient."""
    told: Any
    """[chunks, ...]: totals."""


def run_program(program: Program, stages: Sequence[Stage], own: Any, shared: Any, micro_batches: Any,
                hidden: jax.ShapeDtypeStruct, *, totals: Any, fold: Callable[[Any, Any, jax.Array], Any],
                which: jax.Array | int = 0, accumulate: jnp.dtype | None = None) -> Result:
    """Forwards and backwards of all micro-batches. Call where `pipe` is a manual axis (in a `shard_map`).

    Args:
      program: see `tables.make_tables`.
      stages: one for each kind of stage.
      own: weights of this rank's stages, [chunks, ...]. Leaves that aren't floating-point have no gradient.
      shared: weights that every stage may use; each rank has all.
      micro_batches: leaves [micro-batches, ...]; every rank has all. There may be more than the schedule takes.
      hidden: what stages hand on.
      totals: what is told by the stages of one chunk, before any.
      fold: (total, told, micro-batch) -> total. Where a rank does no forward, it is called with zeros and any
        micro-batch.
      which: of the program's schedules.
      accumulate: type of sums of gradients; default float32.
    """
    weights, tree = jax.tree.flatten((own, shared))
    run = _Run(program, weights, tree, len(jax.tree.leaves(own)), micro_batches, hidden)
    kinds = [_compile_kind(stage, run) for stage in stages]
    kept, put_off = (_Pool.of([shapes(kind) for kind in kinds])
                     for shapes in (lambda kind: kind.kept, lambda kind: kind.put_off))
    told = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds[0].told)
    state = _State(
        jnp.zeros((program.slots.inputs + 1, *hidden.shape), hidden.dtype),
        jnp.zeros((program.slots.gradients + 1, *hidden.shape), hidden.dtype),
        kept.buffers(program.slots.stash), put_off.buffers(program.slots.put_off),
        {place: jnp.zeros(w.shape, accumulate or jnp.float32) for place, w in enumerate(weights)},
        jax.tree.map(lambda x: jnp.broadcast_to(x, (program.chunks, *x.shape)), totals))
    rank = jax.lax.axis_index(AXIS)
    tables = jax.tree.map(lambda table: jnp.asarray(table)[which, :, rank].astype(jnp.int32), program.tables)

    def tick(now: jax.Array, state: _State) -> _State:
        row = jax.tree.map(lambda table: table[now], tables)
        made, sums = _first_part(run, kinds, kept, put_off, told, row, state)
        state = state._replace(sums=sums)
        total = fold(_at(state.told, row.forward_chunk), made.told, row.forward_micro_batch)
        state = state._replace(told=_put(state.told, row.forward_chunk, total),
                               put_off=_put(state.put_off, row.backward_put_off, made.put_off))
        inputs, gradients = _exchange(program, row, state, made)
        sums = _last_part(run, kinds, kept, put_off, row, state)
        # Only now: the forward's slot may be the one that the weights' part has just read for the last time.
        return state._replace(inputs=inputs, gradients=gradients, sums=sums,
                              kept=_put(state.kept, row.forward_stash, made.kept))
    with jax.named_scope(LOOP):
        ticks = program.ticks[0] if len(program.ticks) == 1 else jnp.asarray(program.ticks)[which]
        state = jax.lax.fori_loop(0, ticks, tick, state)
    own_sums, shared_sums = jax.tree.unflatten(tree, [state.sums[place] for place in range(len(weights))])
    return Result(own_sums, shared_sums, state.told)


class _State(NamedTuple):
    """What a tick leaves to the next."""

    inputs: jax.Array
    gradients: jax.Array
    kept: list[jax.Array]
    put_off: list[jax.Array]
    sums: dict[int, jax.Array]
    """Of gradients, by the weight's place."""
    told: Any


class _Made(NamedTuple):
    """By the first part of a tick."""

    output: jax.Array
    gradient: jax.Array
    kept: list[jax.Array]
    put_off: list[jax.Array]
    told: Any


class _Run(NamedTuple):
    """What all kinds of stages share."""

    program: Program
    weights: list[jax.Array]
    """Of own stages, [chunks, ...], then shared ones."""
    tree: Any
    own: int
    """How many of the weights are of own stages."""
    micro_batches: Any
    hidden: jax.ShapeDtypeStruct

    def of_chunk(self, chunk: jax.Array) -> list[jax.Array]:
        """The weights that a stage sees."""
        return [*_at(self.weights[:self.own], chunk), *self.weights[self.own:]]

    def add(self, sums: dict[int, jax.Array], places: list[int], gradients: Sequence[jax.Array],
            chunk: jax.Array) -> dict[int, jax.Array]:
        """Sums with the gradients of the weights at these places, some of which may be there again."""
        new = dict(sums)
        for place, gradient in zip(places, gradients, strict=True):
            gradient = gradient.astype(new[place].dtype)
            new[place] = new[place].at[chunk].add(gradient) if place < self.own else new[place] + gradient
        return new


class _Kind(NamedTuple):
    """A kind of stage, cut into its parts."""

    forward: Callable[[list, jax.Array, Any], tuple[jax.Array, Any, list[jax.Array]]]
    """(weights, hidden, micro-batch) -> (hidden, told, what the backward needs)."""
    told: Any
    kept: list[jax.ShapeDtypeStruct]
    put_off: list[jax.ShapeDtypeStruct]
    trained: tuple[int, ...]
    """Which weights it has gradients of."""
    backward: Halves
    """Of (gradient of the output, *trained weights, *kept) -> (gradient of the input, *gradients of weights)."""

    @property
    def soon(self) -> list[int]:
        """Weights whose gradients the first half has: of norms and the router, of the output head, and of experts what
        further rounds of dispatch add."""
        return [self.trained[output - 1] for output in self.backward.early[1:]]

    @property
    def late(self) -> list[int]:
        """Those whose gradients the second half has."""
        return [self.trained[output - 1] for output in self.backward.late]


def _compile_kind(stage: Stage, run: _Run) -> _Kind:
    """Traces a stage once to learn what its backward needs, and cuts that in two."""
    chunk = jnp.int32(0)
    arguments = (run.of_chunk(chunk), jnp.zeros(run.hidden.shape, run.hidden.dtype), _at(run.micro_batches, chunk))
    trained = _trained(stage, run, *arguments)
    statics: list[tuple[Pull, Any]] = []

    def differentiated(weights: list[jax.Array], hidden: jax.Array, micro_batch: Any) -> tuple:
        def call(chosen: list[jax.Array], hidden: jax.Array) -> tuple:
            whole = list(weights)
            for place, weight in zip(trained, chosen, strict=True):
                whole[place] = weight
            own, shared = jax.tree.unflatten(run.tree, whole)
            return stage(own, shared, hidden, micro_batch)
        chosen = [weights[place] for place in trained]
        made: tuple = jax.vjp(call, chosen, hidden, has_aux=True)
        (output, loss), pull, told = made
        without_weights = Pull.of(pull, chosen)
        statics.append((dataclasses.replace(without_weights, kept=[]), loss.dtype))
        return output, told, without_weights.kept
    output, told, kept = jax.eval_shape(differentiated, *arguments)
    pull, loss_dtype = statics[0]

    def backward(gradient: jax.Array, *values: jax.Array) -> list[jax.Array]:
        own, kept = values[:len(trained)], list(values[len(trained):])
        d_weights, d_hidden = dataclasses.replace(pull, kept=kept)(own, (gradient, jnp.ones((), loss_dtype)))
        return [d_hidden, *d_weights]
    halves = split(backward, output, *(arguments[0][place] for place in trained), *kept)
    first = jax.eval_shape(halves.first, output, *(arguments[0][place] for place in trained), *kept)
    # The output's gradient waits as well, if the weights' part reads it.
    put_off = [*first[len(halves.early):], *([output] if 0 in halves.reads else [])]
    return _Kind(differentiated, told, kept, put_off, trained, halves)


def _trained(stage: Stage, run: _Run, weights: list[jax.Array], hidden: jax.Array, micro_batch: Any
             ) -> tuple[int, ...]:
    """Which floating-point weights the stage uses."""
    def call(weights: list[jax.Array]) -> Any:
        own, shared = jax.tree.unflatten(run.tree, weights)
        return stage(own, shared, hidden, micro_batch)[0]
    traced = jax.make_jaxpr(call)(weights)
    _, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return tuple(place for place, (weight, is_used) in enumerate(zip(weights, used, strict=True))
                 if is_used and jnp.issubdtype(weight.dtype, jnp.floating))


class _Pool(NamedTuple):
    """Buffers that kinds of stages share."""

    shapes: list[jax.ShapeDtypeStruct]
    """Of one slot of each buffer."""
    places: list[list[int]]
    """[kind]: the buffer of each of its arrays."""

    @classmethod
    def of(cls, arrays: Sequence[Sequence[Any]]) -> _Pool:
        """For arrays of each kind."""
        shapes: list[jax.ShapeDtypeStruct] = []
        places: list[list[int]] = []
        for kind in arrays:
            free = list(range(len(shapes)))
            taken: list[int] = []
            for array in kind:
                fits = [n for n in free if (shapes[n].shape, shapes[n].dtype) == (array.shape, array.dtype)]
                if fits:
                    free.remove(fits[0])
                else:
                    shapes.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
                taken.append(fits[0] if fits else len(shapes) - 1)
            places.append(taken)
        return cls(shapes, places)

    def buffers(self, slots: int) -> list[jax.Array]:
        return [jnp.zeros((slots, *shape.shape), shape.dtype) for shape in self.shapes]

    def slot(self, kind: int, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """One slot of every buffer with the arrays of this kind, zeros elsewhere."""
        slot = [jnp.zeros(shape.shape, shape.dtype) for shape in self.shapes]
        for place, array in zip(self.places[kind], arrays, strict=True):
            slot[place] = array
        return slot

    def read(self, kind: int, buffers: list[jax.Array], slot: jax.Array) -> list[jax.Array]:
        """The arrays of this kind in a slot."""
        return _at([buffers[place] for place in self.places[kind]], slot)


def _first_part(run: _Run, kinds: list[_Kind], kept: _Pool, put_off: _Pool, told: Any, row: Any, state: _State
                ) -> tuple[_Made, dict[int, jax.Array]]:
    """A forward, a backward for inputs, both or nothing; and sums of gradients, with those that a backward has then."""
    nothing = jnp.zeros(run.hidden.shape, run.hidden.dtype)
    soon = {place for kind in kinds for place in kind.soon}

    def forwards(number: int) -> Task:
        kind = kinds[number]
        return Task(lambda weights, values: kind.forward(weights, *values), run.of_chunk(row.forward_chunk),
                    (_at(state.inputs, row.forward_input), _at(run.micro_batches, row.forward_micro_batch)))

    def backwards(number: int) -> Task:
        kind, weights = kinds[number], run.of_chunk(row.backward_chunk)
        return Task(lambda weights, values: kind.backward.first(values[0], *weights, *values[1]),
                    [weights[place] for place in kind.trained],
                    (_at(state.gradients, row.backward_gradient), kept.read(number, state.kept, row.backward_stash)))

    def branch(forward: int | None, backward: int | None) -> Callable[[dict[int, jax.Array]], tuple]:
        def work(sums: dict[int, jax.Array]) -> tuple[_Made, dict[int, jax.Array]]:
            made = _Made(nothing, nothing, _at(state.kept, row.forward_stash), _at(state.put_off, row.backward_put_off),
                         told)
            tasks = [*([] if forward is None else [forwards(forward)]),
                     *([] if backward is None else [backwards(backward)])]
            results = side_by_side(*tasks)
            if forward is not None:
                output, new_told, arrays = results[0]
                made = made._replace(output=output, told=new_told, kept=kept.slot(forward, arrays))
            if backward is not None:
                kind, first, gradient = kinds[backward], results[-1], tasks[-1].values[0]
                early = len(kind.backward.early)
                later = [*first[early:], *([gradient] if 0 in kind.backward.reads else [])]
                made = made._replace(gradient=first[0], put_off=put_off.slot(backward, later))
                sums = run.add(sums, kind.soon, first[1:early], row.backward_chunk)
            return made, sums
        return work
    with jax.named_scope(FIRST_PART):
        made, sums = jax.lax.switch(row.branch, [branch(*pair) for pair in run.program.branches],
                                    {place: state.sums[place] for place in soon})
    return made, state.sums | sums


def _exchange(program: Program, row: Any, state: _State, made: _Made) -> tuple[jax.Array, jax.Array]:
    """Inputs and gradients with what arrives."""
    ranks = jax.lax.axis_size(AXIS)

    def arrived(buffer: jax.Array, sent: jax.Array, shifts: tuple[int, ...], slots: jax.Array) -> jax.Array:
        for index, shift in enumerate(shifts):
            came = sent if shift == 0 else jax.lax.ppermute(sent, AXIS, [(r, (r + shift) % ranks)
                                                                         for r in range(ranks)])
            buffer = _put(buffer, slots[index], came)
        return buffer
    return (arrived(state.inputs, made.output, program.output_shifts, row.output_arrives),
            arrived(state.gradients, made.gradient, program.gradient_shifts, row.gradient_arrives))


def _last_part(run: _Run, kinds: list[_Kind], kept: _Pool, put_off: _Pool, row: Any, state: _State
               ) -> dict[int, jax.Array]:
    """Sums of gradients of weights, with what the weights' part of a backward adds."""
    late = {place for kind in kinds for place in kind.late}

    def branch(number: int) -> Callable[[dict[int, jax.Array]], dict[int, jax.Array]]:
        kind = kinds[number]

        def work(sums: dict[int, jax.Array]) -> dict[int, jax.Array]:
            made = put_off.read(number, state.put_off, row.weights_put_off)
            weights = run.of_chunk(row.weights_chunk)
            inputs: list[Any] = [None, *(weights[place] for place in kind.trained),
                                 *kept.read(number, state.kept, row.weights_stash)]
            if 0 in kind.backward.reads:
                inputs[0] = made.pop()
            gradients = kind.backward.second(*made, *(inputs[place] for place in kind.backward.reads))
            return run.add(sums, kind.late, gradients, row.weights_chunk)
        return work
    with jax.named_scope(LAST_PART):
        sums = jax.lax.switch(row.weights_kind + 1, [lambda sums: sums, *(branch(n) for n in range(len(kinds)))],
                              {place: state.sums[place] for place in late})
    return state.sums | sums


def _at(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, index: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda x, value: jax.lax.dynamic_update_index_in_dim(x, value, index, 0), tree, new)
