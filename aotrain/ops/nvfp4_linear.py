"""nvfp4_linear: y = x @ w.T + b whose forward and backward products run in NVFP4.

    output[M, N]      = nvfp4(x) @ nvfp4_16x16(w).T
    grad_input[M, K]  = nvfp4_stochastic(g) @ nvfp4_16x16(w)
    grad_weight[N, K] = nvfp4_stochastic(T(g.T)) @ nvfp4(T(x.T)).T

Blocks are 1 x 16 along the contracted dimension; those of the weight are 16 x 16, so that forward and backward multiply
by the same weight: the gradient is that of the function computed. T is a random Hadamard transform along M in blocks
of 16, the same for both operands, so that it cancels in the product and only spreads outliers. Gradients are rounded
stochastically because rounding to nearest is biased for values that are small within their block, which accumulates.

No product has a state. The noise is a function of `seed` and of the gradient (`formats.data_key`): a step that is
repeated, by activation checkpointing or after resuming, repeats its bits; ranks with the same gradient keep the same
weights; other data have other noise.

What is kept for backward, by `save_for_backward`, changes no bit: "high_precision" x as it came; "quantized" its 0.57
bytes per element of codes and scales for grad_weight, and no cast of x in backward. The weight is the parameter itself.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, on the methodology of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from aotrain.formats import BLOCKWISE_1X16, BLOCKWISE_16X16
from aotrain.kernels.nvfp4_cast import Nvfp4Operand, nvfp4_cast, nvfp4_cast_both
from aotrain.kernels.nvfp4_mm import nvfp4_mm
from aotrain.ops.scaled_linear import check_save_for_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4Recipe:
    """Which parts of the method apply; the defaults are the paper's.

    Attributes:
        hadamard: transform both operands of grad_weight.
        stochastic_rounding: of the gradient, in both products of backward.
        square_weight_blocks: scale weights per 16 x 16. Otherwise per 1 x 16 along the contracted dimension: products
            that are 0.6 dB more accurate, but forward and backward multiply by different weights.
        quantize_grad_weight: run grad_weight in NVFP4; otherwise in the input's dtype.
    """

    hadamard: bool = True
    stochastic_rounding: bool = True
    square_weight_blocks: bool = True
    quantize_grad_weight: bool = True


NVFP4_RECIPE = Nvfp4Recipe()
# formats.hadamard_signs(0).
DEFAULT_SIGNS = (-1, 1, -1, -1, 1, -1, 1, -1, 1, 1, 1, 1, 1, -1, 1, -1)


@dataclass(frozen=True, slots=True)
class _Options:
    recipe: Nvfp4Recipe
    signs: tuple[int, ...]
    seed: int
    emulate: bool
    save_for_backward: str

    @property
    def weight_block(self) -> tuple[int, int]:
        return BLOCKWISE_16X16 if self.recipe.square_weight_blocks else BLOCKWISE_1X16

    def tiles(self, x: torch.Tensor) -> bool:
        """Whether scales are written as native products read them."""
        return x.is_cuda and not self.emulate

    @property
    def grad_seed(self) -> int | None:
        return self.seed if self.recipe.stochastic_rounding else None


def nvfp4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: Nvfp4Recipe = NVFP4_RECIPE,
    signs: Sequence[int] = DEFAULT_SIGNS,
    seed: int = 0,
    emulate: bool = False,
    save_for_backward: str = "high_precision",
) -> torch.Tensor:
    """A linear layer whose matrix products run in NVFP4. Differentiable in x, weight and bias.

    Inside an autocast region x is first cast to the autocast dtype, as for `torch.nn.functional.linear`.

    Args:
        x: [..., K], float32, bfloat16 or float16; any number of rows, none included, and any K and N.
        weight: [N, K], any of these dtypes; its gradient has its dtype.
        bias: [N] or None; added in the output's dtype.
        recipe: which parts of the method apply.
        signs: 16 of 1 and -1, of the Hadamard transform; the same ones throughout a training.
        seed: of the noise of stochastic rounding. Layers may share it.
        emulate: compute products in bfloat16 or float32 arithmetic even on hardware that multiplies NVFP4.
        save_for_backward: "high_precision" or "quantized"; see above.

    Returns:
        [..., N] in x's dtype (the autocast dtype where that applies).

    Raises:
        ValueError: the last dimension of x is not K, an unknown `save_for_backward`, or not 16 signs.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"nvfp4_linear got x of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}; "
            f"want the last dimension of x to be {weight.shape[-1]}."
        )
    check_save_for_backward(save_for_backward)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    options = _Options(recipe, tuple(signs) if recipe.hadamard else (), seed, emulate, save_for_backward)
    output = cast(torch.Tensor, _Nvfp4Linear.apply(rows, weight, options))
    output = output.reshape(*x.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias.to(output.dtype)


class _Nvfp4Linear(torch.autograd.Function):
    """The three products on 2-D operands; bias and reshaping are left to autograd.

    Saved: the weight if x needs a gradient; if the weight does, x or the three tensors of its quantized transposition.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, options: _Options) -> torch.Tensor:
        keep_codes = options.save_for_backward == "quantized" and options.recipe.quantize_grad_weight
        tiles = options.tiles(x)
        x_t = None
        if ctx.needs_input_grad[1] and keep_codes:
            x_q, x_t = nvfp4_cast_both(x, signs=options.signs, blocked=tiles)
        else:
            x_q = nvfp4_cast(x, blocked=tiles)
        w_q = nvfp4_cast(weight, block=options.weight_block, blocked=tiles)
        y = _product(x_q, w_q, x.dtype, options)
        kept = (None,) if not ctx.needs_input_grad[1] else (x,) if x_t is None else x_t
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.options, ctx.dtypes = options, (x.dtype, weight.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,) = grad_outputs
        options: _Options = ctx.options
        weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        quantize_grad_weight = needs_weight and options.recipe.quantize_grad_weight
        grad_q, grad_t = _cast_gradient(grad, needs_input, quantize_grad_weight, options)
        grad_input = grad_weight = None
        if grad_q is not None:
            w_t = nvfp4_cast(weight, block=options.weight_block, transposed=True, blocked=options.tiles(weight))
            grad_input = _product(grad_q, w_t, ctx.dtypes[0], options)
        if grad_t is not None:
            if len(kept) > 1:
                x_t = Nvfp4Operand(*kept)
            else:
                x_t = nvfp4_cast(kept[0], transposed=True, signs=options.signs, blocked=options.tiles(grad))
            grad_weight = _product(grad_t, x_t, ctx.dtypes[1], options)
        elif needs_weight:
            grad_weight = (grad.t() @ kept[0].to(grad.dtype)).to(ctx.dtypes[1])
        return grad_input, grad_weight, None


def _cast_gradient(
    grad: torch.Tensor, as_is: bool, transposed: bool, options: _Options
) -> tuple[Nvfp4Operand | None, Nvfp4Operand | None]:
    """The gradient for grad_input and for grad_weight, each where it is wanted; its maxima from one read."""
    signs, seed, tiles = options.signs, options.grad_seed, options.tiles(grad)
    if as_is and transposed:
        return nvfp4_cast_both(grad, signs=signs, seed=seed, blocked=tiles)
    return (
        nvfp4_cast(grad, seed=seed, blocked=tiles) if as_is else None,
        nvfp4_cast(grad, transposed=True, signs=signs, seed=seed, blocked=tiles) if transposed else None,
    )


def _product(lhs: Nvfp4Operand, rhs: Nvfp4Operand, out_dtype: torch.dtype, options: _Options) -> torch.Tensor:
    return nvfp4_mm(lhs, rhs, out_dtype, emulate=options.emulate)
