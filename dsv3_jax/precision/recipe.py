"""Which format every number has where it is used (paper 2, section 3.3; paper 1, section 3.1).

Under every recipe the embedding, the output head, the router, norms, softmax and losses compute as in bf16, master
weights and sums of gradients are float32. A recipe says how the three products of a linear layer read their operands,
what its backward keeps of the input, and how rows travel to experts and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Precision
from dsv3_jax.precision.quantised import BLOCK, COLUMN, ROW, Quantised, Tile


@dataclasses.dataclass(frozen=True)
class Cast:
    """How a tensor becomes the E4M3 operand of a product; rows are tokens, or a weight's inputs."""

    tile: Tile | None
    """Values that share a scale; None: all of the tensor."""
    power_of_two: bool = False
    """Whether scales are powers of two, so that another tiling of the same values rounds little or nothing more."""


@dataclasses.dataclass(frozen=True)
class LinearRecipe:
    """The operands of y = x W (Fprop), dx = dy W^T (Dgrad) and dW = x^T dy (Wgrad); all E4M3, scaled online."""

    input: Cast = Cast(ROW)
    """x in Fprop."""
    weight: Cast = Cast(BLOCK)
    """W in Fprop and Dgrad."""
    gradient: Cast = Cast(ROW)
    """dy in Dgrad."""
    input_of_wgrad: Cast = Cast(COLUMN)
    """x in Wgrad, which sums over tokens."""
    gradient_of_wgrad: Cast = Cast(COLUMN)
    """dy in Wgrad."""
    kept: Literal["input", "input_of_wgrad", "e5m6"] = "input_of_wgrad"
    """What the backward keeps of x: one of the operands above (of "input" it makes the other anew), or E5M6."""
    promoted: bool = True
    """Whether a product's sum is in float32; False: all of it as Hopper's tensor cores add (accumulator.py)."""


_ALIKE, _ALIKE_DOWN = Cast(ROW, power_of_two=True), Cast(COLUMN, power_of_two=True)


Sent = Literal["plain", "float8"]


@dataclasses.dataclass(frozen=True)
class PrecisionRecipe:
    """The linear layers of a model by what they need; None: products in the compute dtype."""

    linear: LinearRecipe | None = None
    """Projections of attention and of the prediction modules, and all that is not named below."""
    after_attention: LinearRecipe | None = None
    """Its input is read again by the backward of attention, so it is kept in E5M6."""
    up: LinearRecipe | None = None
    """Up-projections of experts. Their input is sent in E4M3 with scales that are powers of two, and kept as sent."""
    down: LinearRecipe | None = None
    """SwiGLU and down-projection: what is kept is SwiGLU's input in E4M3; its output is computed again."""
    dispatch: Sent = "plain"
    """Tokens on their way to experts: in the compute dtype, or as `up` reads them."""
    dispatch_gradients: Sent = "plain"
    """Gradients of the experts' outputs on the same way: in the compute dtype, or as `down` reads them."""


_LINEAR = LinearRecipe()
_AFTER_ATTENTION = LinearRecipe(input=_ALIKE, input_of_wgrad=_ALIKE_DOWN, kept="e5m6")
_UP = LinearRecipe(input=_ALIKE, input_of_wgrad=_ALIKE_DOWN, kept="input")
_DOWN = LinearRecipe(gradient=_ALIKE, gradient_of_wgrad=_ALIKE_DOWN)


def _changed(change: Callable[[LinearRecipe], LinearRecipe]) -> PrecisionRecipe:
    """The paper's recipe with every linear layer's changed; what is sent is no longer what products read."""
    linear, after_attention, up, down = map(change, (_LINEAR, _AFTER_ATTENTION, _UP, _DOWN))
    return PrecisionRecipe(linear, after_attention, up, down)


def _with_tile(tile: Tile | None, *operands: str) -> PrecisionRecipe:
    """The paper's recipe with another tile for these operands of every linear layer."""
    return _changed(lambda recipe: dataclasses.replace(
        recipe, **{name: dataclasses.replace(getattr(recipe, name), tile=tile) for name in operands}))


RECIPES: dict[Precision, PrecisionRecipe] = {
    "bf16": PrecisionRecipe(),
    "float32": PrecisionRecipe(),
    "fp8": PrecisionRecipe(_LINEAR, _AFTER_ATTENTION, _UP, _DOWN, dispatch="float8", dispatch_gradients="float8"),
    "fp8_tensor_scales": _with_tile(None, "input", "weight", "gradient", "input_of_wgrad", "gradient_of_wgrad"),
    "fp8_gradient_blocks": _with_tile(BLOCK, "gradient", "gradient_of_wgrad"),
    "fp8_no_promotion": _changed(lambda recipe: dataclasses.replace(recipe, promoted=False)),
}
COMPUTE_FORMAT: dict[Precision, Literal["bf16", "float32"]] = {
    name: "float32" if name == "float32" else "bf16" for name in RECIPES}
"""Of weights and activations, except for the operands of products that a recipe names."""
COMPUTE_DTYPE = {name: {"bf16": jnp.bfloat16, "float32": jnp.float32}[form] for name, form in COMPUTE_FORMAT.items()}


def compute_weights(params: Any, precision: Precision) -> Any:
    """float32 master weights as the types the layers compute with.

    Weights marked `float32` (router and norm gains; paper 2, section 3.3.1) stay as they are, and so do those that
    `inference_weights` or `interop.load` made float8. Activations follow the embedding's type; norms, softmax, router
    and losses convert to float32 themselves.
    """
    def cast(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        keep = variable.get_metadata("float32") or isinstance(value, Quantised)
        return variable if keep else variable.replace(value.astype(COMPUTE_DTYPE[precision]))
    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def holds_float8(precision: Precision) -> bool:
    """Whether weights can stay as the products read them: in blocks, which transposed are blocks."""
    recipe = RECIPES[precision].linear
    return recipe is not None and recipe.weight == Cast(BLOCK)


def inference_weights(params: Any, precision: Precision) -> Any:
    """`compute_weights`, and where the recipe allows it weights of products in float8, transposed as products read them
    (and as they are published): half the memory, and no cast in the forward. What is in float8 already stays so."""
    if not holds_float8(precision):
        return compute_weights(params, precision)

    def hold(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, Quantised) or not variable.get_metadata("float8", False):
            return variable
        return in_float8(variable, Quantised.of(value, BLOCK).transposed)
    return jax.tree.map(hold, compute_weights(params, precision), is_leaf=lambda x: isinstance(x, nnx.Variable))


def in_float8(variable: nnx.Variable, transposed: Any) -> nnx.Variable:
    """The variable with its matrices' transposes as value, and its axes named so."""
    *leading, width_in, width_out = variable.get_metadata("axes")
    return variable.replace(transposed, axes=(*leading, width_out, width_in))
