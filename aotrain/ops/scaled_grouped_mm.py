"""scaled_grouped_mm: the linear layers of all experts at once, with their three products in low precision.

With x [M, K] sorted by expert, and x[e] the rows of expert e,

    output[e]      = x[e] @ weight[e]         weight[e] is [K, N]      forward
    grad_input[e]  = g[e] @ weight[e].T                                backward
    grad_weight[e] = x[e].T @ g[e]                                     backward

Every expert is a linear layer of its own: values and gradients are those of
`scaled_linear(x[e], weight[e].T, bias, recipe)`, and no scale depends on another expert's rows. Experts have any number
of rows, none included, without regard to what hardware aligns to.

Kept for backward: x and the weight as they came, and nothing of one whose partner needs no gradient.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch

from aotrain.formats import ScaledTensor, Scaling
from aotrain.kernels import scaled_cast
from aotrain.kernels.grouped_cast import grouped_cast, grouped_cast_both, grouped_cast_gap, grouped_cast_t
from aotrain.kernels.groups import GroupLayout, group_layout
from aotrain.kernels.scaled_grouped_mm import (
    grouped_mm,
    grouped_mm_contracted,
    scaled_grouped_mm_contracted,
)
from aotrain.kernels.scaled_grouped_mm import scaled_grouped_mm as scaled_product
from aotrain.ops.fake_quantized_grouped_mm import FakeQuantizedMethod, fake_quantized_grouped_mm
from aotrain.ops.grouped_operands import bias_gradient, bias_of_rows, check_grouped
from aotrain.ops.nvfp4_grouped_mm import Nvfp4Method, nvfp4_grouped_mm
from aotrain.recipes import LinearRecipe, get_recipe

# How groups of rows are multiplied.
GroupedMethod = LinearRecipe | Nvfp4Method | FakeQuantizedMethod

# Columns that hardware wants a group of a transposed 8-bit operand to start at a multiple of: 16 bytes.
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class _Options:
    recipe: LinearRecipe
    emulate: bool


def grouped_recipe(name: str) -> LinearRecipe | Nvfp4Method:
    """What `scaled_grouped_mm` takes, by a name or alias of `aotrain.recipes.RECIPES` or "nvfp4".

    Raises:
        ValueError: unknown name, or a recipe that groups cannot have.
    """
    if name == "nvfp4":
        return Nvfp4Method()
    recipe = get_recipe(name)
    _check_recipe(recipe)
    return recipe


def scaled_grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    recipe: GroupedMethod,
    *,
    bias: torch.Tensor | None = None,
    emulate: bool = False,
) -> torch.Tensor:
    """Each row of x times the matrix of its group. Differentiable in x, weight and bias.

    Inside an autocast region x is first cast to the autocast dtype, as in `scaled_linear`.

    Args:
        x: [M, K], float32, bfloat16 or float16, rows sorted by group.
        weight: [E, K, N], any of these dtypes and any strides: fast for the transposed view of an [E, N, K] parameter.
        offsets: int32 [E] on x's device: the row after the last of each group, in order, the last one at most M.
        recipe: formats of the three products, the same as for linear layers; or an `Nvfp4Method` or a
            `FakeQuantizedMethod`, for which see `aotrain.ops.nvfp4_grouped_mm` and `fake_quantized_grouped_mm`.
        bias: None, [N], or [E, N] for one per group; added in the output's dtype.
        emulate: compute low-precision products in bfloat16 arithmetic even on hardware that has them.

    Returns:
        [M, N] in x's dtype (the autocast dtype where that applies). Rows past the last group are zero, as is their
        gradient, whatever x and the gradient of the output hold there.

    Raises:
        ValueError: shapes or devices that do not go together, or a recipe whose casts need more than a block of
            elements (stochastic rounding, random transforms); on CPU also offsets out of order or beyond M, naming the
            group. On a GPU nobody waits for the offsets: a group that ends before it starts counts as empty, and one
            that ends beyond M ends there.
        TypeError: offsets that are not int32.
        RuntimeError: a GPU without the product and emulate=False.
    """
    if isinstance(recipe, Nvfp4Method):
        return nvfp4_grouped_mm(x, weight, offsets, recipe, bias=bias)
    if isinstance(recipe, FakeQuantizedMethod):
        activation = None if recipe.activation is None else recipe.activation.arithmetic(x)
        weight_quantizer = None if recipe.weight is None else recipe.weight.arithmetic(weight.mT)
        return fake_quantized_grouped_mm(x, weight, offsets, activation, weight_quantizer, bias=bias)
    check_grouped(x, weight, offsets, bias)
    _check_recipe(recipe)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    layout = group_layout(offsets, x.shape[0], _alignment(recipe))
    return cast(torch.Tensor, _ScaledGroupedMM.apply(x, weight, bias, *layout[:2], _Options(recipe, emulate)))


def _check_recipe(recipe: LinearRecipe) -> None:
    """Raise for a recipe that cannot cast groups, in forward already for backward's products."""
    for product, scaling in (
        ("output", recipe.output.lhs),
        ("grad_input", recipe.grad_input.lhs),
        ("grad_weight", recipe.grad_weight.lhs),
        ("grad_weight", recipe.grad_weight.rhs),
    ):
        gap = None if scaling is None else grouped_cast_gap(scaling)
        if gap is not None:
            raise ValueError(
                f"scaled_grouped_mm got a recipe that casts to {scaling} for {product}, which groups of rows cannot: "
                f"{gap}."
            )


class _ScaledGroupedMM(torch.autograd.Function):
    """The three products of all groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ends: torch.Tensor,
        padded_ends: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        layout = GroupLayout(ends, padded_ends, x.shape[0], _alignment(options.recipe))
        gemm = options.recipe.output
        if gemm.lhs is None or gemm.rhs is None:
            y = grouped_mm(x, weight.to(x.dtype), layout)
        else:
            x_q, w_q = grouped_cast(x, layout, gemm.lhs), scaled_cast(weight.mT, gemm.rhs)
            y = scaled_product(x_q, w_q, layout, x.dtype, fast_accum=gemm.fast_accum, emulate=options.emulate)
        if bias is not None:
            # Not in place: Dynamo of torch 2.11 then drops all gradients of the function, without a word.
            y = y + bias_of_rows(bias.to(y.dtype), layout)
        ctx.save_for_backward(
            *(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None),
            *(ends, padded_ends),
        )
        ctx.options, ctx.dtypes = options, (x.dtype, weight.dtype)
        ctx.bias = None if bias is None else (bias.dim() == 2, bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        options: _Options = ctx.options
        x, weight, ends, padded_ends = ctx.saved_tensors
        layout = GroupLayout(ends, padded_ends, grad.shape[0], _alignment(options.recipe))
        grad_q, grad_t = _cast_gradient(
            grad,
            layout,
            options.recipe.grad_input.lhs if ctx.needs_input_grad[0] else None,
            options.recipe.grad_weight.lhs if ctx.needs_input_grad[1] else None,
        )
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            gemm = options.recipe.grad_input
            if grad_q is None or gemm.rhs is None:
                grad_input = grouped_mm(grad, weight.mT.to(grad.dtype), layout).to(ctx.dtypes[0])
            else:
                w_q = scaled_cast(weight, gemm.rhs)
                grad_input = scaled_product(
                    grad_q, w_q, layout, ctx.dtypes[0], fast_accum=gemm.fast_accum, emulate=options.emulate
                )
        if ctx.needs_input_grad[1]:
            gemm = options.recipe.grad_weight
            if grad_t is None or gemm.rhs is None:
                grad_weight = grouped_mm_contracted(grad, x.to(grad.dtype), layout).to(ctx.dtypes[1])
            else:
                x_t = grouped_cast_t(x, layout, gemm.rhs)
                grad_weight = scaled_grouped_mm_contracted(
                    grad_t, x_t, layout, ctx.dtypes[1], fast_accum=gemm.fast_accum, emulate=options.emulate
                )
            grad_weight = grad_weight.mT  # [E, N, K] -> [E, K, N]
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad, ends, *ctx.bias)
        return grad_input, grad_weight, grad_bias, None, None, None


def _cast_gradient(
    grad: torch.Tensor, layout: GroupLayout, scaling: Scaling | None, scaling_t: Scaling | None
) -> tuple[ScaledTensor | None, ScaledTensor | None]:
    """The rows of the gradient by `scaling` and its groups' transpositions by `scaling_t`, where they have one."""
    if scaling is not None and scaling_t is not None:
        return grouped_cast_both(grad, layout, scaling, scaling_t)
    return (
        None if scaling is None else grouped_cast(grad, layout, scaling),
        None if scaling_t is None else grouped_cast_t(grad, layout, scaling_t),
    )


def _alignment(recipe: LinearRecipe) -> int:
    """Columns that a group of a transposed operand of grad_weight takes a multiple of: 16 bytes, and whole blocks."""
    scalings = (recipe.grad_weight.lhs, recipe.grad_weight.rhs)
    return max(_ALIGN, *(0 if scaling is None else scaling.block[1] for scaling in scalings))
