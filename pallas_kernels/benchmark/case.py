"""What a measured case is: an operation at a shape, with its work, its oracle and its rivals."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax

from pallas_kernels import tuning
from pallas_kernels.benchmark.rivals import Rival
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.hopper import Tile

OperationName = Literal["fp8_matmul", "fp8_wgrad", "grouped_fp8_matmul", "grouped_fp8_wgrad", "grouped_matmul",
                        "quantise", "quantise_transposed", "quantise_both", "swiglu_quantise", "mla_decode",
                        "mla_attention", "mla_attention_gradients"]
OPERATIONS: tuple[OperationName, ...] = get_args(OperationName)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: OperationName
    shape: str
    """As a reader knows it."""
    rows: int
    draw: Callable[[jax.Array], tuple[jax.Array, ...]]
    """Random key -> operands."""
    run: Callable[..., Any]
    """(*operands, backend=...): the operation as its caller has it."""
    oracle: Callable[..., Any]
    """The same in plain JAX, in float32; of a cast, the very bits."""
    flops: float = 0
    operand: Literal["fp8", "bf16"] = "fp8"
    """What is multiplied."""
    other_sizes: tuple[int, ...] = ()
    """Group sizes that the operation must get right as well: the last operand, in place of the drawn ones."""
    key: tuning.Key | None = None
    """What a Hopper kernel's tile is chosen by."""
    whole_tiles: bool = False
    rivals: Mapping[str, Sequence[Rival]] = dataclasses.field(default_factory=dict)
    """What else computes it, by the name of the column; of several ways to write it the fastest counts."""
    torch_shape: tuple[int, int, int] | None = None
    """(M, N, K) of a product that torch has too."""

    @property
    def is_cast(self) -> bool:
        """Whether the result must equal the oracle's to the bit."""
        return "quantise" in self.operation

    @functools.cached_property
    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.eval_shape(self.draw, jax.random.key(0))

    @functools.cached_property
    def bytes(self) -> int:
        """That must move at least: each operand read once, each result written once."""
        out = jax.eval_shape(functools.partial(self.run, backend="reference"), *self.operands)
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in (*self.operands, *jax.tree.leaves(out)))

    @property
    def tile(self) -> Tile | None:
        """Which tile a Hopper kernel takes; None where there is no choice."""
        if self.key is None:
            return None
        if self.operand == "bf16":
            from pallas_kernels.grouped_matmul import gpu
            return gpu.tile_for(BLOCK, self.key.columns)
        return tuning.tile_for(**dataclasses.asdict(self.key), whole=self.whole_tiles)

    @property
    def predicted_clocks(self) -> float | None:
        """Of a Hopper card, by the rule that tiles are chosen by; None where it says nothing."""
        if self.key is None or self.tile is None:
            return None
        return tuning.predicted_clocks(**dataclasses.asdict(self.key), shape=(self.tile.rows, self.tile.columns),
                                       itemsize=1 if self.operand == "fp8" else 2)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """What the work takes at these rates, whichever bounds it."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)
