"""Range learning: scales, and zero points, as parameters that training moves.

With `code = clamp(round(x / s) + z, lo, hi)` and `values = (code - z) * s`, an element is inside when its code was not
clamped. Gradients of a loss with respect to `values` are g; sums are over the elements of a block, of which there are
n; rounding is taken for the identity:

    grad_x = g                              inside, 0 elsewhere
    grad_s = c * sum(g * (code - z - x/s))  inside, c * sum(g * (code - z)) elsewhere
    grad_z = c * sum(0)                     inside, c * sum(-s * g) elsewhere          (asymmetric mappings only)
    c      = 1 / sqrt(n * hi)

That is LSQ (Esser et al., "Learned Step Size Quantization", 2020, sections 2.1 and 2.2), with the zero point of LSQ+
(Bhalgat et al., 2020) kept a whole number: forward rounds it and keeps it in lo..hi. The factor c makes steps of scales
relative to their size comparable to those of weights; an Adam does not see it.

Forward uses `clamp(s, min=1e-9)`; a scale that has fallen below still has its gradient, so it can come back. Backward
keeps x, s and z, and makes the codes again.
"""

import math
from typing import Any

import torch

from aotrain.formats import AffineFormat

SCALE_MIN = 1e-9


def effective_range(
    format: AffineFormat, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and the zero point (int32) that a learned range stands for, without gradient."""
    scale = scale.detach().clamp(min=SCALE_MIN)
    if zero_point is None:
        return scale, None
    return scale, zero_point.detach().round().clamp(format.quant_min, format.quant_max).to(torch.int32)


def fake_quantize_learned(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, format: AffineFormat
) -> torch.Tensor:
    """Values of x's codes with a given range, differentiable with respect to x and the range.

    Args:
        x: [..., K].
        scale: [..., K / group_size].
        zero_point: of the scale's shape, codes in any dtype; None for zero.
        format: codes and group size; domain INT or NONE.
    """
    return _LearnedRange.apply(x, scale, zero_point, format)


class _LearnedRange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, format: AffineFormat
    ) -> torch.Tensor:
        ctx.format = format
        ctx.save_for_backward(x, scale, zero_point)
        return format.dequantize(format.quantize(x, *effective_range(format, scale, zero_point)), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        format: AffineFormat = ctx.format
        used_scale, used_zero_point = effective_range(format, scale, zero_point)
        steps = format.steps(x, used_scale, used_zero_point)  # [..., blocks, block]
        inside = (steps >= format.quant_min) & (steps <= format.quant_max)
        grad = grads[0].unflatten(-1, steps.shape[-2:])
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(inside, grad, torch.zeros_like(grad)).reshape(x.shape)
        factor = 1 / math.sqrt(steps.shape[-1] * max(format.quant_max, 1))
        step_size = used_scale.float().unsqueeze(-1)
        grad = grad.float()
        if ctx.needs_input_grad[1]:
            codes = steps.clamp(format.quant_min, format.quant_max).float()
            if used_zero_point is not None:
                codes = codes - used_zero_point.unsqueeze(-1)
            slope = torch.where(inside, codes - x.float().reshape(steps.shape) / step_size, codes)
            grad_scale = ((grad * slope).sum(-1) * factor).to(scale.dtype)
        if zero_point is not None and ctx.needs_input_grad[2]:
            outside = torch.where(inside, torch.zeros_like(grad), -step_size * grad)
            grad_zero_point = (outside.sum(-1) * factor).to(zero_point.dtype)
        return grad_x, grad_scale, grad_zero_point, None
