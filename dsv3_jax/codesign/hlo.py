"""Reads the text of a compiled XLA program: instructions in the order the compiler put them, loops, matrix FLOPs.

The text of an optimised program is its schedule (`is_scheduled=true`), for TPU and GPU alike. XLA's own cost analysis
counts a loop's body once and is missing for a GPU that is not there, so executions and FLOPs are counted here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

DTYPE_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
               "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e4m3": 1, "f8e5m2": 1,
               "f8e8m0fnu": 1}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_PARENTHESIS = re.compile(r"[()]")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)="
                     r"(?:%([\w.\-]+)|\{([^}]*)\})")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    """The result's shape as printed; a tuple in parentheses."""
    opcode: str
    arguments: str
    """What stands between the parentheses: operands, or the value of a constant."""
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def op_name(self) -> str:
        """The path of JAX scopes and primitives that this came from; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations that the attributes `kinds` name."""
        names: list[str] = []
        for kind, one, several in _CALLED.findall(self.attributes):
            if kind in kinds:
                names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
        return names


Computation = dict[str, Instruction]
"""Instructions by name, in schedule order."""


class Program(NamedTuple):
    """A compiled module."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation or is not scheduled, so its order would mean nothing.
    """
    if "is_scheduled=true" not in text[:text.find("\n")]:
        raise ValueError("the program's text is not a schedule (no is_scheduled=true in its first line)")
    computations: dict[str, Computation] = {}
    entry, lines = "", {}
    for line in _whole_lines(text):
        if line.startswith(" "):
            found = _LINE.match(line)
            if found:
                instruction = _instruction(line, found)
                lines[instruction.name] = instruction
        elif header := _HEADER.match(line):
            lines = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
    if not entry:
        raise ValueError("the program's text has no ENTRY computation")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of a program, those of instructions whole: what a kernel's author attached may have line breaks."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith(" ") and line and line != "}" and not line.startswith(" "):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return Instruction(found.group(2), line[start:end], line[end:opening].strip(), line[opening + 1:closing],
                       line[closing + 1:], bool(found.group(1)))


def _closing(line: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for mark in _PARENTHESIS.finditer(line, opening):
        depth += 1 if mark.group() == "(" else -1
        if depth == 0:
            return mark.start()
    return len(line)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a printed shape."""
    return [(dtype, tuple(int(size) for size in dims.split(",") if size))
            for dtype, dims in _ARRAY.findall(shape) if dtype in DTYPE_BYTES]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a printed shape, without layout padding."""
    return int(sum(DTYPE_BYTES[dtype] * math.prod(dims) for dtype, dims in arrays(shape)))


def operand_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes of the operands of `instruction`."""
    return sum(shape_bytes(computation[name].shape) for name in instruction.operands if name in computation)


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the `while` of `computation` runs; None if that is known only at run time.

    From XLA's annotation, or from a condition `counter < constant`, the counter's first value (not 0 where the compiler
    has peeled iterations off) and what the body adds to it (not 1 where it has unrolled).
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = program.computations[loop.called("condition")[0]]
    test = _root(condition)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition[name] for name in test.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return None
    index = _tuple_index(counter)
    first = _origin(computation, computation[loop.operands[0]], index)
    step = _added_to(program.computations[loop.called("body")[0]], index)
    if first.opcode != "constant" or not step:
        return None
    return math.ceil((int(limit.arguments) - int(first.arguments)) / step)


def _added_to(body: Computation, index: int) -> int | None:
    """What a loop's body adds to element `index` of its state; None if that is not plain."""
    new = _origin(body, _root(body), index)
    if new.opcode != "add":
        return None
    terms = [_origin(body, body[name]) for name in new.operands]
    added = [int(term.arguments) for term in terms if term.opcode == "constant"]
    kept = [term for term in terms if term.opcode == "get-tuple-element" and _tuple_index(term) == index]
    return added[0] if len(added) == len(kept) == 1 else None


def _origin(computation: Computation, line: Instruction, index: int = 0) -> Instruction:
    """Where a value comes from, copies undone; of a tuple, the element `index`."""
    if line.opcode == "tuple":
        line = computation[line.operands[index]]
    while line.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        line = computation[line.operands[0]]
    return line


def _root(computation: Computation) -> Instruction:
    return next(line for line in computation.values() if line.root)


def _tuple_index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.attributes).group(1))  # type: ignore[union-attr]


class Walk:
    """A program's instructions with how often each runs.

    Args:
      program: what to walk.
      loops: executions of loops whose length is known only at run time, by the named scope they stand in:
        `{"micro_batches": 15}` for a loop traced inside `jax.named_scope("micro_batches")`.
      choices: executions of each branch of conditionals, for one of the conditional, by the named scope that they stand
        in directly; all branches of others count as run.

    Attributes:
      unknown: op_names of loops of varying length that no scope names; their bodies count once.
    """

    def __init__(self, program: Program, loops: Mapping[str, float],
                 choices: Mapping[str, Sequence[float]] | None = None):
        self.program, self.loops, self.choices = program, dict(loops), dict(choices or {})
        self.unknown: list[str] = []

    def trips(self, computation: Computation, loop: Instruction) -> float:
        """Executions of the body of a `while` for one of the loop."""
        count = trip_count(self.program, computation, loop)
        if count is not None:
            return count
        own = loop.op_name.split("/body/")[-1]
        for scope, times in self.loops.items():
            if re.search(rf"\b{scope}\b", own):
                return times
        if loop.op_name not in self.unknown:
            self.unknown.append(loop.op_name)
        return 1

    def inner(self, computation: Computation, instruction: Instruction) -> list[tuple[str, float]]:
        """Computations that `instruction` of `computation` runs, each with its number of executions."""
        if instruction.opcode == "while":
            return [(name, self.trips(computation, instruction)) for name in instruction.called("body")]
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            scope = re.search(r"(\w+)/cond$", instruction.op_name)
            shares = self.choices.get(scope.group(1)) if scope else None
            return list(zip(branches, shares or [1] * len(branches), strict=True))
        if instruction.opcode in ("fusion", "call", "async-start"):
            return [(name, 1) for name in instruction.called("calls", "to_apply")]
        return []

    def computations(self) -> Iterator[tuple[str, float]]:
        """Every computation that schedules work, with its executions; fused computations are not among them."""
        def visit(name: str, times: float) -> Iterator[tuple[str, float]]:
            yield name, times
            computation = self.program.computations[name]
            for line in computation.values():
                if line.opcode in ("while", "conditional", "call"):
                    for inner, repeats in self.inner(computation, line):
                        if times * repeats:
                            yield from visit(inner, times * repeats)
        yield from visit(self.program.entry, 1)

    def instructions(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that runs, those inside fusions too: (its computation, itself, executions)."""
        def visit(name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
            computation = self.program.computations[name]
            for line in computation.values():
                yield computation, line, times
                for inner, repeats in self.inner(computation, line):
                    if times * repeats:
                        yield from visit(inner, times * repeats)
        yield from visit(self.program.entry, 1)

    @functools.cached_property
    def flops_of(self) -> Callable[[Computation, Instruction], float]:
        """Matrix FLOPs of one execution of an instruction, all that it calls included."""
        @functools.cache
        def of_computation(name: str) -> float:
            computation = self.program.computations[name]
            return sum(of(computation, line) for line in computation.values())

        def of(computation: Computation, line: Instruction) -> float:
            return (matrix_flops(computation, line)
                    + sum(times * of_computation(name) for name, times in self.inner(computation, line)))
        return of


def matrix_flops(computation: Computation, line: Instruction) -> float:
    """FLOPs of a matrix product (two for a multiply and add); 0 for every other instruction."""
    if line.opcode == "dot":
        return _dot_flops(computation, line, r"lhs_contracting_dims=\{([\d,]*)\}")
    if line.opcode == "convolution":
        return _convolution_flops(computation, line)
    if line.opcode == "custom-call":
        if "__cublas" in line.attributes:
            return _dot_flops(computation, line, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
        if is_grouped_product(line):
            return 2.0 * math.prod(grouped_shape(computation, line))
        if re.search(r"fp8_(matmul|wgrad)", line.op_name):
            return 2.0 * math.prod(arrays(line.shape)[0][1]) * _float8_terms(computation, line)
        if (kernel := attention_kernel(line)) is not None:
            return _attention_flops(computation, line, kernel)
    return 0.0


def attention_kernel(line: Instruction) -> str | None:
    """Which kernel of `pallas_kernels.mla_attention` a custom call is: "mla_attention" forward, and of the backward
    "mla_attention_queries" and "mla_attention_keys"; None for another."""
    found = re.search(r"(mla_attention(_queries|_keys)?)(/(mpmd_map|pallas_call))?$", line.op_name)
    return found.group(1) if found and line.opcode == "custom-call" else None


def _attention_flops(computation: Computation, line: Instruction, kernel: str) -> float:
    """Of the pairs of tokens that are seen, for queries that are a stretch of the keys: in the mean over stretches."""
    floats = [dims for name in line.operands for dtype, dims in arrays(computation[name].shape)
              if dtype != "s32" and len(dims) > 2]
    if len(floats) < 4:
        return 0.0
    (rows, queries, *query), (_, _, *query_rope), (_, keys, *both), _ = floats[:4]
    scores = math.prod(query) + math.prod(query_rope)
    values = math.prod(both) - math.prod(query)
    products = {"mla_attention": scores + values, "mla_attention_queries": 2 * scores + values,
                "mla_attention_keys": 2 * scores + 2 * values}[kernel]
    return 2.0 * rows * queries * (keys + 1) / 2 * products


def is_grouped_product(line: Instruction) -> bool:
    """Whether `line` is a kernel for rows sorted by group, XLA's own on TPU or one of `pallas_kernels`."""
    return line.opcode == "custom-call" and re.search(r"ragged.dot|grouped_(fp8_)?(matmul|wgrad)",
                                                          line.op_name) is not None


def _float8_terms(computation: Computation, line: Instruction) -> int:
    """Terms of each sum in a float8 kernel, whose operands both have them last; 0 for a helper without operands."""
    return max((dims[-1] for name in line.operands for dtype, dims in arrays(computation[name].shape)
                if dtype.startswith("f8")), default=0)


def _dot_flops(computation: Computation, line: Instruction, pattern: str) -> float:
    found = re.search(pattern, line.attributes)
    contracted = [int(i) for i in found.group(1).replace('"', "").split(",") if i] if found else []
    _, left = arrays(computation[line.operands[0]].shape)[0]
    _, result = arrays(line.shape)[0]
    return 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)


def grouped_shape(computation: Computation, line: Instruction) -> tuple[int, int, int]:
    """(P, D, F) of a grouped product, from the [E, D, F] among its operands and result and the rows [P, D] or [P, F],
    or their transposes, that there is room for; zeros for the kernel that computes where groups start."""
    shapes = [dims for name in line.operands for _, dims in arrays(computation[name].shape)]
    shapes += [dims for _, dims in arrays(line.shape)]
    stacks = [dims for dims in shapes if len(dims) == 3]
    if not stacks:
        return 0, 0, 0
    _, *widths = max(stacks, key=math.prod)  # beside float8 weights lie their scales
    rows = [dims[index] for dims in shapes if len(dims) == 2 for index in (0, 1) if dims[1 - index] in widths]
    return max(rows, default=0), widths[0], widths[1]


def _convolution_flops(computation: Computation, line: Instruction) -> float:
    """TPU writes every matrix product as a convolution; batch dimensions become spatial ones with dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None:
        return 0.0
    left_labels, right_labels, out_labels = labels.groups()
    (_, left), (_, right) = (arrays(computation[name].shape)[0] for name in line.operands[:2])
    _, out = arrays(line.shape)[0]
    spatial = [label for label in out_labels if label.isdigit()]
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    flops = 2.0 * math.prod(out[out_labels.index(label)] for label in "bf") * right[right_labels.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", line.attributes)
    for number, label in enumerate(sorted(spatial)):
        def field(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default
        flops *= _valid_taps(left[left_labels.index(label)], right[right_labels.index(label)],
                             out[out_labels.index(label)], int(field("stride", "1")),
                             int(field("pad", "0_0").split("_")[0]), int(field("lhs_dilate", "1")),
                             int(field("rhs_dilate", "1")))
    return flops / (int(groups.group(1)) if groups else 1)


@functools.cache
def _valid_taps(size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, spread: int) -> int:
    """Pairs of output and kernel positions along one dimension that meet an element and not a hole or the padding."""
    taps = 0
    for position in range(out):
        for tap in range(kernel):
            at = position * stride + tap * spread - pad
            taps += 0 <= at <= (size - 1) * dilation and at % dilation == 0
    return taps
