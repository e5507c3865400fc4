"""Integer schemes: codes of 1 to 8 bits with scales and, where the mapping is asymmetric, zero points.

Their gradient is straight-through with constant scales, or, with `scale_gradient`, that of a scale which follows the
element of largest magnitude of its group (`formats.scale_gradient`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from aotrain.formats import AffineFormat, AffineTensor
from aotrain.formats.scale_gradient import follows_maximum
from aotrain.kernels.fake_quantize import (
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_affine_backward_,
    fake_quantize_affine_backward_with_scales,
    fake_quantize_affine_backward_with_scales_,
)
from aotrain.kernels.fake_quantize_marked import clear_saturated_, fake_quantize_affine_marked, marks_pay
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
        if self.scale_gradient and not follows_maximum(self.format):
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
        backward = fake_quantize_affine_backward_with_scales if self.scale_gradient else fake_quantize_affine_backward
        return backward(grad, x.detach(), self.format)

    def marked_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.scale_gradient or not marks_pay(x):
            return self.values(x), None
        return fake_quantize_affine_marked(x.detach(), self.format)

    def pass_gradient_(
        self, grad: torch.Tensor, x: torch.Tensor, saturated: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.scale_gradient:
            return fake_quantize_affine_backward_with_scales_(grad, x.detach(), self.format)
        if saturated is not None:
            return clear_saturated_(grad, saturated, self.format)
        return fake_quantize_affine_backward_(grad, x.detach(), self.format)
