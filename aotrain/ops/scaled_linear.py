"""scaled_linear: y = x @ w.T + b with the three products of its forward and backward in low precision.

    output[M, N]      = x @ w.T        forward
    grad_input[M, K]  = g @ w          backward
    grad_weight[N, K] = g.T @ x        backward

Each product quantizes its own two operands as its `GemmRecipe` says; a product without a recipe runs in the input's
dtype. Where the gradient, or the input that is kept quantized, is needed both as it is and transposed, one
`scaled_cast_both` reads it once for both.

What is kept for backward is the choice of the caller, and changes no bit of the result. Eager, it is:

| `save_for_backward` | of x, per element | of the weight, per element | casts made in backward |
|---|---|---|---|
| "high_precision" | x as it came: 2 bytes in bfloat16 | what `weight_casts` remembers | gradient, weight, x |
| "quantized" | its codes for grad_weight: 1 byte, and the scales | what `weight_casts` remembers | gradient, weight |
| "recompute" | x as it came: 2 bytes in bfloat16 | nothing | gradient, weight, x |

x as it came is shared with whoever else keeps x. Nothing of x is kept for a weight without gradient, and x as it came
for a recipe with grad_weight in high precision. The weight is saved as the parameter itself, which costs nothing.
Beside it, `weight_casts` may remember codes, up to 2 bytes per element; "recompute" forgoes that, and is to be given
one that remembers nothing, as `Float8Linear` does.

Compiled, the codes of the weight are never kept: its cast in backward depends on the gradient. Of x, "high_precision"
and "quantized" both leave the compiler to keep x or its codes, whichever it finds smaller; in "recompute" the cast of x
depends on the gradient, too, and what is kept is x, or what the compiler can make x of again.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch

from aotrain.formats import BLOCKWISE_128X128, TENSORWISE, ScaledTensor, Scaling
from aotrain.kernels import (
    operand_multiples,
    scaled_cast,
    scaled_cast_after,
    scaled_cast_both,
    scaled_mm,
    with_equal_depths,
)
from aotrain.recipes import GemmRecipe, LinearRecipe

SAVE_FOR_BACKWARD = ("high_precision", "quantized", "recompute")
# Blocks that a transposition maps to themselves.
_SYMMETRIC_BLOCKS = (TENSORWISE, BLOCKWISE_128X128)


class WeightCasts(Protocol):
    """Where casts of a weight come from; a cache, for instance. They may be padded with zeros (`operand_multiples`)."""

    def __call__(
        self, weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
    ) -> ScaledTensor:
        """The weight [N, K], or its transposition [K, N], quantized; in a compiled graph no earlier than `after`."""
        ...


@runtime_checkable
class QuantizedWeight(Protocol):
    """A weight that comes quantized, such as one that FSDP2 gathered in float8. A tensor of its own kind."""

    def quantized(self, scaling: Scaling, *, transposed: bool) -> ScaledTensor:
        """The codes and scales that casting the weight [N, K], or its transposition, would give."""
        ...


def cast_weight(
    weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
) -> ScaledTensor:
    """`WeightCasts` that keeps nothing. A weight that comes quantized is asked for its codes."""
    if isinstance(weight, QuantizedWeight):
        return weight.quantized(scaling, transposed=transposed)
    return _cast(weight.t() if transposed else weight, scaling, "rhs", after)


class OperandCasts(Protocol):
    """How the input and the gradient of the output are cast; with scales of more rows than are here, for instance.

    Casts may be padded with zeros (`operand_multiples`); products are cut back.
    """

    def __call__(
        self,
        x: torch.Tensor,
        scaling: Scaling | None,
        scaling_t: Scaling | None,
        *,
        operand: Literal["input", "grad_output"],
        after: torch.Tensor | None = None,
    ) -> tuple[ScaledTensor | None, ScaledTensor | None]:
        """The operand x [M, K] or [M, N] by `scaling`, and its transposition by `scaling_t`, each where it has one.

        In a compiled graph no earlier than `after`.
        """
        ...


def cast_operand(
    x: torch.Tensor,
    scaling: Scaling | None,
    scaling_t: Scaling | None,
    *,
    operand: Literal["input", "grad_output"],
    after: torch.Tensor | None = None,
) -> tuple[ScaledTensor | None, ScaledTensor | None]:
    """`OperandCasts` with scales of what is here; what is needed both ways is read once.

    On a GPU the casts come with the padding that their products need.
    """
    side_t: Literal["lhs", "rhs"] = "rhs" if operand == "input" else "lhs"
    if scaling is not None and scaling_t is not None and after is None:
        pad, pad_t = operand_multiples(x, scaling, "lhs"), operand_multiples(x.t(), scaling_t, side_t)
        return scaled_cast_both(x, scaling, scaling_t, pad=pad, pad_t=pad_t)
    return (
        None if scaling is None else _cast(x, scaling, "lhs", after),
        None if scaling_t is None else _cast(x.t(), scaling_t, side_t, after),
    )


def _cast(x: torch.Tensor, scaling: Scaling, side: Literal["lhs", "rhs"], after: torch.Tensor | None) -> ScaledTensor:
    pad = operand_multiples(x, scaling, side)
    return scaled_cast(x, scaling, pad=pad) if after is None else scaled_cast_after(x, scaling, after, pad=pad)


@dataclass(frozen=True, slots=True)
class _Options:
    recipe: LinearRecipe
    emulate: bool
    save_for_backward: str
    weight_casts: WeightCasts
    operand_casts: OperandCasts


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recipe: LinearRecipe,
    *,
    emulate: bool = False,
    save_for_backward: str = "high_precision",
    weight_casts: WeightCasts = cast_weight,
    operand_casts: OperandCasts = cast_operand,
) -> torch.Tensor:
    """A linear layer whose three matrix products run in the recipe's formats. Differentiable in x, weight and bias.

    Inside an autocast region x is first cast to the autocast dtype, as for `torch.nn.functional.linear`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any number of rows, none included.
        weight: [N, K], any of these dtypes; its gradient has its dtype.
        bias: [N] or None; added in the output's dtype.
        recipe: formats of the three products.
        emulate: compute float8 products in bfloat16 arithmetic even on hardware that has float8. Always so on CPU.
        save_for_backward: "high_precision", "quantized" or "recompute"; see above.
        weight_casts: gives the quantized weight, in forward and in backward.
        operand_casts: casts the input, in forward and in backward, and the gradient.

    Returns:
        [..., N] in x's dtype (the autocast dtype where that applies).

    Raises:
        ValueError: the last dimension of x is not K, or an unknown `save_for_backward`.
        RuntimeError: a GPU without float8 matrix products and emulate=False.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"scaled_linear got x of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}; "
            f"want the last dimension of x to be {weight.shape[-1]}."
        )
    check_save_for_backward(save_for_backward)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    options = _Options(recipe, emulate, save_for_backward, weight_casts, operand_casts)
    output = cast(torch.Tensor, _ScaledLinear.apply(rows, weight, options))
    output = output.reshape(*x.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


def check_save_for_backward(value: str) -> None:
    """Raise ValueError listing the valid values of `save_for_backward` for any other."""
    if value not in SAVE_FOR_BACKWARD:
        raise ValueError(f"save_for_backward got {value!r}; want one of {', '.join(map(repr, SAVE_FOR_BACKWARD))}.")


class _ScaledLinear(torch.autograd.Function):
    """The three products on 2-D operands; bias and reshaping are left to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, options: _Options) -> torch.Tensor:
        output = options.recipe.output
        keep_codes = ctx.needs_input_grad[1] and options.save_for_backward == "quantized"
        scaling_t = options.recipe.grad_weight.rhs if keep_codes else None
        x_q, x_t = options.operand_casts(x, output.lhs, scaling_t, operand="input")
        if x_q is None or output.rhs is None:
            y = x @ weight.to(x.dtype).t()
        else:
            w_q = options.weight_casts(weight, output.rhs, transposed=False)
            y = _product(x_q, w_q, output, x.dtype, options, (x.shape[0], weight.shape[0]))
        # x, or the codes of its transposition and their scale; the weight.
        kept = (None, None) if not ctx.needs_input_grad[1] else (x, None) if x_t is None else x_t[:2]
        ctx.save_for_backward(*kept, weight if ctx.needs_input_grad[0] else None)
        ctx.options, ctx.dtypes, ctx.shapes = options, (x.dtype, weight.dtype), (x.shape, weight.shape)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,) = grad_outputs
        options: _Options = ctx.options
        x, x_scale, weight = ctx.saved_tensors
        grad_input_recipe, grad_weight_recipe = options.recipe.grad_input, options.recipe.grad_weight
        grad_q, grad_t = options.operand_casts(
            grad,
            grad_input_recipe.lhs if ctx.needs_input_grad[0] else None,
            grad_weight_recipe.lhs if ctx.needs_input_grad[1] else None,
            operand="grad_output",
        )
        # Eager, the casts below are made here in any case.
        after = grad if torch.compiler.is_compiling() else None
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            if grad_q is None or grad_input_recipe.rhs is None:
                grad_input = (grad @ weight.to(grad.dtype)).to(ctx.dtypes[0])
            else:
                w_q = options.weight_casts(weight, grad_input_recipe.rhs, transposed=True, after=after)
                grad_input = _product(grad_q, w_q, grad_input_recipe, ctx.dtypes[0], options, ctx.shapes[0])
        if ctx.needs_input_grad[1]:
            scaling = grad_weight_recipe.rhs
            if grad_t is None or scaling is None:
                grad_weight = (grad.t() @ x.to(grad.dtype)).to(ctx.dtypes[1])
            else:
                x_t = None if x_scale is None else ScaledTensor(x, x_scale, scaling)
                if x_t is None:
                    after = after if options.save_for_backward == "recompute" else None
                    _, x_t = options.operand_casts(x, None, scaling, operand="input", after=after)
                assert x_t is not None
                grad_weight = _product(grad_t, x_t, grad_weight_recipe, ctx.dtypes[1], options, ctx.shapes[1])
        return grad_input, grad_weight, None


def _product(
    lhs: ScaledTensor,
    rhs: ScaledTensor,
    recipe: GemmRecipe,
    out_dtype: torch.dtype,
    options: _Options,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """The product of operands that may be padded, cut back to its shape; contiguous."""
    lhs, rhs = with_equal_depths(lhs, rhs)
    product = scaled_mm(lhs, rhs, out_dtype, fast_accum=recipe.fast_accum, emulate=options.emulate)
    if product.shape[0] != shape[0]:
        product = product.narrow(0, 0, shape[0])
    if product.shape[1] != shape[1]:
        product = product.narrow(1, 0, shape[1]).clone(memory_format=torch.contiguous_format)
    return product


def transpose_quantized(q: ScaledTensor) -> ScaledTensor | None:
    """The quantized transposition of a matrix from the quantized matrix; None where it has other scales."""
    if q.scaling.block not in _SYMMETRIC_BLOCKS:
        return None
    return ScaledTensor(q.data.t().contiguous(), q.scale.t().contiguous(), q.scaling)
