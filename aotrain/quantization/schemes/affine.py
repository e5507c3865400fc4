"""Integer schemes: codes of 1 to 8 bits with scales and, where the mapping is asymmetric, zero points.

Their gradient is straight-through with constant scales, or, with `scale_gradient`, that of a scale which follows the
element of largest magnitude of its group. A symmetric scale is a multiple of that magnitude, so quantization is
homogeneous, Q(a x) = a Q(x) for a > 0, and by Euler's theorem its gradient along x is known exactly: with g the
gradient of the values Q(x) and dx that of x, sum(dx * x) = sum(g * Q(x)) over a group. Straight through, sum(dx * x)
is sum(g * x) less what saturates. The difference belongs to the scale, hence to the element `x_m` of largest magnitude:

    dx_m += (sum(g * Q(x)) - sum(dx * x)) / x_m

Source: the step size gradient of Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, equation 3, carried
on to the maximum that the step size is taken from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from aotrain.formats import AffineFormat, AffineTensor, MappingType
from aotrain.kernels.fake_quantize import (
    clear_saturated_,
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_affine_backward_,
    fake_quantize_affine_marked,
    marks_pay,
)
from aotrain.quantization.schemes.base import Encoded, TensorScheme, refuse_given


@dataclass(frozen=True, slots=True)
class AffineScheme(TensorScheme):
    """Integers in groups along the last dimension; the numbers are those of `formats.AffineFormat`.

    Attributes:
        format: codes, mapping, group size and dtypes.
        scale_gradient: differentiate scales too. Symmetric mappings only. Schemes that differ in it are equal: their
            codes are the same.

    Raises:
        ValueError: scale_gradient with another mapping.
    """

    format: AffineFormat
    scale_gradient: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.scale_gradient and (self.format.mapping is not MappingType.SYMMETRIC or self.format.has_zero_point):
            raise ValueError(
                f"AffineScheme got scale_gradient with {self.format}; want a symmetric mapping without zero points, "
                "or scale_gradient=False."
            )

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        refuse_given(self, global_scale=global_scale)
        return Encoded(*self.format.quantize(x.detach(), scale, zero_point))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return self.format.dequantize(AffineTensor(*encoded[:3]), dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.format.quant_min, self.format.quant_max

    def problem(self, shape: Sequence[int]) -> str | None:
        size = self.format.group_size
        if size is None or (shape[-1] and shape[-1] % size == 0):
            return None
        return f"the last dimension of {tuple(shape)} is no multiple of the group size {size}: choose a smaller group"

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_affine(x.detach(), self.format)

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        passed = fake_quantize_affine_backward(grad, x.detach(), self.format)
        return self._with_scale_gradient(passed, grad, x.detach()) if self.scale_gradient else passed

    def marked_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.scale_gradient or not marks_pay(x):
            return self.values(x), None
        return fake_quantize_affine_marked(x.detach(), self.format)

    def pass_gradient_(
        self, grad: torch.Tensor, x: torch.Tensor, saturated: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.scale_gradient:
            return self.pass_gradient(grad, x)
        if saturated is not None:
            return clear_saturated_(grad, saturated, self.format)
        return fake_quantize_affine_backward_(grad, x.detach(), self.format)

    def _with_scale_gradient(self, passed: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The straight-through gradient `passed`, plus what is due to scales; in float32 inside. May write to it."""
        size = x.shape[-1] if self.format.group_size is None else self.format.group_size
        straight, g, values, blocks = (
            each.unflatten(-1, (-1, size)).float() for each in (passed, grad, self.values(x), x)
        )
        where = blocks.abs().argmax(dim=-1, keepdim=True)  # the first, of several
        extreme = blocks.gather(-1, where)
        due = (g * values - straight * blocks).sum(dim=-1, keepdim=True) / extreme
        # A scale at its lower bound is a constant; a group that is not finite has no gradient, as without scales.
        bound = self.format.smallest_scale(self.format.compute_dtype or x.dtype)
        follows = extreme.abs() > bound * (self.format.quant_max - self.format.quant_min) / 2
        due = due.masked_fill(~(follows & extreme.isfinite()), 0.0)
        return straight.scatter_add_(-1, where, due).to(grad.dtype).reshape(x.shape)
