# ruff: noqa: E501 - compiled programs have long lines
"""The reader of compiled programs, on hand-written ones whose counts can be done in the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.codesign.collectives import Layout, collectives, device_groups
from dsv3_jax.codesign.hlo import Walk, arrays, matrix_flops, parse, shape_bytes

# A loop of 5 that was peeled once (the counter starts at 1), with an asynchronous gather around a product, and a loop
# whose length is known only at run time.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%fused (p0: f32[4,8], p1: f32[8,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp()/layer/dot_general"}
}

%body (arg: (s32[], f32[4,8], f32[2,8])) -> (s32[], f32[4,8], f32[2,8]) {
  %arg = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[2,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = f32[2,8]{1,0} get-tuple-element(%arg), index=2
  %one = s32[] constant(1)
  %gather = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %early = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  %whole = f32[8,8]{1,0} all-gather-done(%gather)
  %y = f32[4,8]{1,0} fusion(%x, %whole), kind=kOutput, calls=%fused
  %swapped = f32[4,8]{1,0} all-to-all(%y), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[2,8]{1,0}) tuple(%next, %swapped, %w)
}

%condition (arg.1: (s32[], f32[4,8], f32[2,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}, f32[2,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(6)
  ROOT %more = pred[] compare(%i.1, %limit), direction=LT
}

%outer_condition (arg.2: (s32[], s32[], f32[4,8])) -> pred[] {
  %arg.2 = (s32[], s32[], f32[4,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %n.2 = s32[] get-tuple-element(%arg.2), index=1
  ROOT %more.2 = pred[] compare(%i.2, %n.2), direction=LT
}

%outer_body (arg.3: (s32[], s32[], f32[4,8])) -> (s32[], s32[], f32[4,8]) {
  %arg.3 = (s32[], s32[], f32[4,8]{1,0}) parameter(0)
  %n.3 = s32[] get-tuple-element(%arg.3), index=1
  %x.3 = f32[4,8]{1,0} get-tuple-element(%arg.3), index=2
  %start = s32[] constant(1)
  %copied = s32[] copy(%start)
  %shard = f32[2,8]{1,0} constant({...})
  %init = (s32[], f32[4,8]{1,0}, f32[2,8]{1,0}) tuple(%copied, %x.3, %shard)
  %loop = (s32[], f32[4,8]{1,0}, f32[2,8]{1,0}) while(%init), condition=%condition, body=%body
  %x.4 = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %out.3 = (s32[], s32[], f32[4,8]{1,0}) tuple(%n.3, %n.3, %x.4)
}

ENTRY %main (p: f32[4,8], n: s32[]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %first = (s32[], s32[], f32[4,8]{1,0}) tuple(%zero, %n, %p)
  %micro = (s32[], s32[], f32[4,8]{1,0}) while(%first), condition=%outer_condition, body=%outer_body, metadata={op_name="jit(step)/micro_batches/while"}
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%micro), index=2
}
"""
LAYOUT = Layout({"pipe": 1, "data": 1, "scale_out": 2, "scale_up": 4}, (0, 0, 0, 0, 1, 1, 1, 1))


def test_shapes():
    assert arrays("(f32[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[3], s32[], token[])") == [
        ("f32", (4, 8)), ("bf16", (3,)), ("s32", ())]
    assert shape_bytes("(f32[4,8]{1,0}, bf16[3]{0}, f8e4m3fn[5], s32[])") == 128 + 6 + 5 + 4


def test_executions_and_flops():
    """Outer loop 3 times, inner loop 6 - 1: each execution has a 4x8 by 8x8 and a 4x8 by 8x4 product."""
    walk = Walk(parse(PROGRAM), {"micro_batches": 3})
    found = {line.name: (times, times * matrix_flops(computation, line))
             for computation, line, times in walk.instructions() if matrix_flops(computation, line)}
    assert found == {"dot.1": (15, 15 * 2 * 4 * 8 * 8), "early": (15, 15 * 2 * 4 * 8 * 4)}
    assert walk.unknown == []


@pytest.mark.parametrize(("change", "executions"), [
    (("%one = s32[] constant(1)", "%one = s32[] constant(2)"), 3),  # unrolled by two: 1, 3, 5
    (("%next = s32[] add(%i, %one)", "%next = s32[] add(%one, %i)"), 5)])
def test_loop_that_counts_otherwise(change, executions):
    walk = Walk(parse(PROGRAM.replace(*change)), {"micro_batches": 1})
    assert [times for _, line, times in walk.instructions() if line.name == "dot.1"] == [executions]
    assert walk.unknown == []


def test_counter_that_is_not_counted_up_is_told():
    walk = Walk(parse(PROGRAM.replace("add(%i, %one)", "multiply(%i, %one)")), {"micro_batches": 1})
    assert [times for _, line, times in walk.instructions() if line.name == "dot.1"] == [1]
    assert len(walk.unknown) == 1


def test_loop_of_unknown_length_is_told():
    walk = Walk(parse(PROGRAM), {})
    assert sum(times for _, line, times in walk.instructions() if line.name == "dot.1") == 5
    assert walk.unknown == ["jit(step)/micro_batches/while"]


def test_collectives():
    """The gather sends a 2x8 shard to 3 others inside the domain while `early` runs; half of the 4x8 all-to-all goes
    to the other domain, with nothing meanwhile."""
    gather, swap = collectives(Walk(parse(PROGRAM), {"micro_batches": 3}), LAYOUT)
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", ("scale_up",), 15)
    assert (gather.fast_bytes, gather.slow_bytes, gather.flops_between) == (3 * 64, 0, 2 * 4 * 8 * 4)
    assert (swap.kind, swap.axes, swap.times) == ("all-to-all", ("scale_out",), 15)
    assert (swap.fast_bytes, swap.slow_bytes, swap.overlapped) == (0, 64, False)


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=mesh['pipe'=1,'data'=1,'scale_out'=2,'scale_up'=4] {'scale_out'}",
     [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]])])
def test_forms_of_device_groups(text, groups):
    assert device_groups(text, LAYOUT).tolist() == groups


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown form of replica_groups"):
        device_groups("replica_groups=@V3", LAYOUT)


def test_unscheduled_text_is_refused():
    with pytest.raises(ValueError, match="not a schedule"):
        parse("HloModule jit_step, entry_computation_layout={}\n\nENTRY %main () -> f32[] {\n}\n")


@pytest.mark.parametrize(("kind", "attributes", "shape", "fast", "slow"), [
    # 8 devices in 2 domains of 4. A domain lacks the other's half of the result, brought in by 4 links.
    ("all-gather", "dimensions={0}", "f32[2,8]", 64 * 2 * 3, 64),
    ("reduce-scatter", "dimensions={0}, to_apply=%add", "f32[16,8]", 512 * 3 / 4, 512 / 8),
    ("all-reduce", "to_apply=%add", "f32[16,8]", 2 * 512 * 3 / 4, 2 * 512 / 8),
    ("all-to-all", "dimensions={0}", "f32[16,8]", 512 * 3 / 8, 512 / 2)])
def test_bytes_of_a_group_over_both_networks(kind, attributes, shape, fast, slow):
    program = f"""HloModule m, is_scheduled=true

ENTRY %main (p: {shape}) -> {shape} {{
  %p = {shape}{{1,0}} parameter(0)
  ROOT %out = {shape}{{1,0}} {kind}(%p), channel_id=1, replica_groups=[1,8]<=[8], {attributes}
}}
"""
    (found,) = collectives(Walk(parse(program), {}), LAYOUT)
    assert (found.axes, found.fast_bytes, found.slow_bytes) == (("scale_out", "scale_up"), fast, slow)


def test_collective_on_the_sparsecore():
    """Started, updated and done as a custom call, the way XLA:TPU does it on Ironwood, around a 4x8 by 8x6 product."""
    program = """HloModule m, is_scheduled=true

%called (p0: f32[2,8]) -> f32[8,8] {
  %p0 = f32[2,8]{1,0} parameter(0)
  ROOT %all-gather.4 = f32[8,8]{1,0} all-gather(%p0), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (w: f32[2,8], a: f32[4,8], b: f32[8,6]) -> f32[8,8] {
  %w = f32[2,8]{1,0} parameter(0)
  %a = f32[4,8]{1,0} parameter(1)
  %b = f32[8,6]{1,0} parameter(2)
  %start = ((), (), (s32[8192]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="TODO", called_computations={%called}, frontend_attributes={is_spmd_generated="true"}
  %update = ((f32[2,8]{1,0}), f32[8,8]{1,0}, (s32[8192]{0})) custom-call-update(%start, %w), output_to_operand_aliasing={{2,0}: (0, {2,0})}
  %product = f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = f32[8,8]{1,0} custom-call-done(%update)
}
"""
    (found,) = collectives(Walk(parse(program), {}), LAYOUT)
    assert (found.kind, found.axes, found.fast_bytes) == ("all-gather", ("scale_up",), 3 * 64)
    assert found.flops_between == 2 * 4 * 8 * 6


def test_all_to_all_on_a_torus_counts_links():
    """On a ring of 4, a byte to a random member crosses (0 + 1 + 2 + 1) / 4 = 1 link."""
    ring = Layout({"pipe": 1, "data": 1, "scale_out": 1, "scale_up": 4}, (0,) * 4, tuple((i, 0) for i in range(4)))
    program = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %p = f32[16,8]{1,0} parameter(0)
  ROOT %out = f32[16,8]{1,0} all-to-all(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
    (found,) = collectives(Walk(parse(program), {}), ring)
    assert found.fast_bytes == 512 * 3 / 4
    assert found.hop_bytes == 512 * 1.0


def _flops(program: str) -> float:
    walk = Walk(parse(program), {})
    return sum(times * matrix_flops(computation, line) for computation, line, times in walk.instructions())


def test_convolution_that_is_a_product():
    assert _flops("""HloModule m, is_scheduled=true

ENTRY %main (a: f32[4,8], b: f32[8,6]) -> f32[4,6] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,6]{1,0} parameter(1)
  ROOT %c = f32[4,6]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
""") == 2 * 4 * 8 * 6


def test_batched_product_as_a_dilated_convolution():
    """A batch of 3 products [4,8]x[8,6], the way XLA:TPU writes it: only one tap in three meets an element."""
    assert _flops("""HloModule m, is_scheduled=true

ENTRY %main (a: f32[3,4,8], b: f32[3,8,6]) -> f32[3,4,6] {
  %a = f32[3,4,8]{2,1,0} parameter(0)
  %b = f32[3,8,6]{2,1,0} parameter(1)
  ROOT %c = f32[3,4,6]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
""") == 3 * 2 * 4 * 8 * 6


def test_flops_of_a_real_program_match_a_hand_count():
    """A scan of 7 layers and a batched product, compiled for the CPU: XLA's own text, not ours."""
    def run(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ w), None
        x, _ = jax.lax.scan(layer, x, weights)
        return jnp.einsum("bqd,bkd->bqk", x.reshape(2, 8, 32), x.reshape(2, 8, 32))
    text = jax.jit(run).lower(np.zeros((16, 32), np.float32), np.zeros((7, 32, 32), np.float32)).compile().as_text()
    assert _flops(text) == 7 * 2 * 16 * 32 * 32 + 2 * 2 * 8 * 8 * 32


@pytest.mark.parametrize(("name", "operands", "result", "flops"), [
    ("fp8_matmul", ("f8e4m3fn[64,256]", "f32[64,2]", "f8e4m3fn[1,384,256]", "f32[1,3,2]"), "bf16[64,384]",
     2 * 64 * 384 * 256),
    ("fp8_wgrad", ("f8e4m3fn[256,512]", "f32[256,4]", "f8e4m3fn[384,512]", "f32[384,4]"), "f32[256,384]",
     2 * 256 * 384 * 512),
    ("grouped_fp8_matmul", ("s32[2]", "f8e4m3fn[512,256]", "f32[512,2]", "f8e4m3fn[4,384,256]", "f32[4,3,2]"),
     "bf16[512,384]", 2 * 512 * 384 * 256),
    ("grouped_fp8_wgrad", ("s32[4]", "f8e4m3fn[256,512]", "f32[256,4]", "f8e4m3fn[384,512]", "f32[384,4]"),
     "f32[4,256,384]", 2 * 256 * 384 * 512),
    ("quantise", ("bf16[64,256]",), "f8e4m3fn[64,256]", 0)])
def test_flops_of_a_float8_kernel(name, operands, result, flops):
    """Of groups, all rows that there is room for, each with one matrix."""
    parameters = "\n".join(f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands))
    text = f"""HloModule m, is_scheduled=true

ENTRY %main () -> {result} {{
{parameters}
  ROOT %out = {result} custom-call({', '.join(f'%p{i}' for i in range(len(operands)))}), custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(step)/{name}/pallas_call"}}
}}
"""
    found = [matrix_flops(computation, line) for computation, line, _ in Walk(parse(text), {}).instructions()]
    assert sum(found) == flops


def test_an_instruction_may_span_lines():
    """As a kernel of several devices does on TPU."""
    program = parse("""HloModule m, is_scheduled=true

%first (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0), metadata={op_name="first"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %sent = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"scale_up\\"]"
}}, metadata={op_name="jit(f)/all_to_all_dispatch/pallas_call"}, backend_config={}
}
""")
    assert program.computations["main"]["sent"].op_name == "jit(f)/all_to_all_dispatch/pallas_call"
    assert {name: list(lines) for name, lines in program.computations.items()} == {"first": ["p"], "main": ["a", "sent"]}
