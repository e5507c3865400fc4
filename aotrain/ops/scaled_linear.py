"""scaled_linear: y = x @ w.T + b with the three products of its forward and backward in low precision.

    output[M, N]      = x @ w.T        forward
    grad_input[M, K]  = g @ w          backward
    grad_weight[N, K] = g.T @ x        backward

Each product quantizes its own two operands as its `GemmRecipe` says; a product without a recipe runs in the input's
dtype. What is saved for backward is x and w as they came in (2 bytes per element in bfloat16, nothing extra: w is the
parameter itself), and the casts of the backward are taken from them.
"""

from typing import Any

import torch

from aotrain.kernels import scaled_cast, scaled_mm
from aotrain.recipes import GemmRecipe, LinearRecipe


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recipe: LinearRecipe,
    *,
    emulate: bool = False,
) -> torch.Tensor:
    """A linear layer whose three matrix products run in the recipe's formats. Differentiable in x, weight and bias.

    Inside an autocast region x is first cast to the autocast dtype, as for `torch.nn.functional.linear`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any number of rows, none included.
        weight: [N, K], any of these dtypes; its gradient has its dtype.
        bias: [N] or None; added in the output's dtype.
        recipe: formats of the three products.
        emulate: compute float8 products in bfloat16 arithmetic even on hardware that has float8. Always so on CPU.

    Returns:
        [..., N] in x's dtype (the autocast dtype where that applies).

    Raises:
        ValueError: the last dimension of x is not K.
        RuntimeError: a GPU without float8 matrix products and emulate=False.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"scaled_linear got x of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}; "
            f"want the last dimension of x to be {weight.shape[-1]}."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    output = _ScaledLinear.apply(rows, weight, recipe, emulate)
    output = output.reshape(*x.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


class _ScaledLinear(torch.autograd.Function):
    """The three products on 2-D operands; bias and reshaping are left to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: LinearRecipe, emulate: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.emulate = recipe, emulate
        return _matmul_nt(x, weight, recipe.output, x.dtype, emulate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (grad_output,) = grad_outputs
        x, weight = ctx.saved_tensors
        recipe, emulate = ctx.recipe, ctx.emulate
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = _matmul_nt(grad_output, weight.t(), recipe.grad_input, x.dtype, emulate)
        if ctx.needs_input_grad[1]:
            grad_weight = _matmul_nt(grad_output.t(), x.t(), recipe.grad_weight, weight.dtype, emulate)
        return grad_input, grad_weight, None, None


def _matmul_nt(
    lhs: torch.Tensor, rhs: torch.Tensor, recipe: GemmRecipe, out_dtype: torch.dtype, emulate: bool
) -> torch.Tensor:
    """lhs[M, K] @ rhs[N, K].T in the recipe's formats, in out_dtype."""
    if recipe.lhs is None or recipe.rhs is None:
        return (lhs @ rhs.to(lhs.dtype).t()).to(out_dtype)
    return scaled_mm(
        scaled_cast(lhs, recipe.lhs),
        scaled_cast(rhs, recipe.rhs),
        out_dtype,
        fast_accum=recipe.fast_accum,
        emulate=emulate,
    )
