"""The gradient of integers whose scale follows the element of largest magnitude of its group: the definition.

A symmetric scale is a multiple of that magnitude, so quantization is homogeneous, Q(a x) = a Q(x) for a > 0, and by
Euler's theorem its gradient along x is known exactly: with g the gradient of the values Q(x) and dx that of x,
sum(dx * x) = sum(g * Q(x)) over a group. Straight through, dx is g where x has a code and 0 elsewhere. The difference
belongs to the scale, hence to the element `x_m` of largest magnitude, the first of several:

    dx_m += (sum(g * Q(x)) - sum(dx * x)) / x_m

Everything is float32, and only dx_m is rounded, once, to the gradient's dtype. The sum is of the differences of the two
products, neighbours first (`pairwise_sum`): kernels add in this order too.

Source: the step size gradient of Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, equation 3, carried
on to the maximum that the step size is taken from.
"""

import math

import torch

from aotrain.formats.affine import AffineFormat, MappingType


def gradient_with_scales(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> torch.Tensor:
    """Gradient of x from that of its quantized values, scales included.

    Args:
        grad: gradient of the values, in the shape of x, any floating dtype.
        x: [..., K] float32, bfloat16 or float16; K a multiple of the group size.
        form: a symmetric format without zero points.

    Returns:
        In grad's dtype, contiguous. A group that is not finite has no gradient; a scale at its lower bound is constant.

    Raises:
        ValueError: another mapping, dtype or shape.
    """
    if not follows_maximum(form):
        raise ValueError(f"gradient_with_scales got {form}; want a symmetric mapping without zero points.")
    x, grad = x.contiguous(), grad.contiguous()
    q = form.quantize(x)
    straight = grad.where(form.in_range(x, q.scale, q.zero_point), 0)
    shape = (q.scale.shape[-1], x.shape[-1] // max(q.scale.shape[-1], 1))
    g, dx, values, blocks = (
        each.unflatten(-1, shape).float() for each in (grad, straight, form.dequantize(q, x.dtype), x)
    )
    where = blocks.abs().argmax(dim=-1, keepdim=True)
    extreme = blocks.gather(-1, where)
    due = pairwise_sum(g * values - dx * blocks) / extreme
    follows = (extreme.abs() > constant_below(form, x.dtype)) & q.scale.isfinite().unsqueeze(-1)
    moved = dx.gather(-1, where) + due.where(follows, 0.0)
    # A conversion of NaN gives another NaN in vectors than one by one, and scatter() another one again.
    moved = moved.to(grad.dtype).masked_fill(moved.isnan(), math.nan)
    here = torch.arange(blocks.shape[-1], device=x.device) == where
    return torch.where(here, moved, straight.unflatten(-1, shape)).reshape(x.shape)


def follows_maximum(form: AffineFormat) -> bool:
    """Whether scales are a multiple of the largest magnitude, and zero stays zero."""
    return form.mapping is MappingType.SYMMETRIC and not form.has_zero_point


def constant_below(form: AffineFormat, dtype: torch.dtype) -> float:
    """Largest magnitude, a float32, up to which a group of this dtype has the smallest scale."""
    bound = form.smallest_scale(form.compute_dtype or dtype) * (form.quant_max - form.quant_min) / 2
    return torch.tensor(bound, dtype=torch.float32, device="cpu").item()


def pairwise_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, kept: of neighbours, then of neighbouring sums, and so on; a missing one is 0."""
    while x.shape[-1] > 1:
        x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2))
        x = x[..., 0::2] + x[..., 1::2]
    return x + 0.0  # a sum of nothing but negative zeros is 0, as it is beside a missing one
