"""Integer schemes: codes of 1 to 8 bits with scales and, where the mapping is asymmetric, zero points."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats import AffineFormat, AffineTensor
from aotrain.kernels.fake_quantize import (
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_affine_backward_,
)
from aotrain.quantization.schemes.base import Encoded, TensorScheme, refuse_given


@dataclass(frozen=True, slots=True)
class AffineScheme(TensorScheme):
    """Integers in groups along the last dimension; the numbers are those of `formats.AffineFormat`.

    Attributes:
        format: codes, mapping, group size and dtypes.
    """

    format: AffineFormat

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
        return fake_quantize_affine_backward(grad, x.detach(), self.format)

    def pass_gradient_(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_affine_backward_(grad, x.detach(), self.format)
