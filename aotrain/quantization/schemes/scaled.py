"""Floating-point schemes with one level of scales: float8 per row, per tensor or per block, and the MX formats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats import ScaledTensor, Scaling, dequantize, quantize
from aotrain.formats.scaling import block_amax
from aotrain.kernels.scaled_cast import scaled_cast
from aotrain.quantization.schemes.base import Encoded, TensorScheme, refuse_given


@dataclass(frozen=True, slots=True)
class ScaledScheme(TensorScheme):
    """Elements with a scale per block; the numbers are those of `formats.quantize`, made by the same kernels.

    Attributes:
        scaling: element format, scale format and block shape. Blocks of one row go with any number of leading
            dimensions; others take matrices, or stacks of them.
        amax_min: smallest value that the largest magnitude of a block counts for; None: the format's own bound.
        amax_max: largest such value; elements beyond it saturate, and have no gradient.
    """

    scaling: Scaling
    amax_min: float | None = None
    amax_max: float | None = None

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        refuse_given(self, zero_point=zero_point, global_scale=global_scale)
        x = x.detach()
        if scale is not None:
            q = quantize(x, self.scaling, scale=scale)
        elif self.amax_min is None and self.amax_max is None:
            q = scaled_cast(x, self.scaling)
        else:
            amax = block_amax(x, self.scaling.block).clamp(self.amax_min, self.amax_max)
            q = quantize(x, self.scaling, amax=amax)
        return Encoded(q.data, q.scale)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(ScaledTensor(encoded.data, encoded.scale, self.scaling), dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return (-128, 127) if self.scaling.element.name == "int8" else (0, 2**self.scaling.element.bits - 1)

    def problem(self, shape: Sequence[int]) -> str | None:
        return None if len(shape) >= 2 else f"{tuple(shape)} is no matrix"

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return grad if self.amax_max is None else torch.where(x.abs() <= self.amax_max, grad, torch.zeros_like(grad))
