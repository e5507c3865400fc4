"""int4 weights for float8 products: groups of 128 with a scale of amax / 8, so that dequantized values fit e4m3 rows.

    scale = max(amax, 1e-6) / 8, in the dtype of the weight     code = clamp(round(x / scale), -8, 7), in float32

Other symmetric int4 scales here are amax / 7.5. The largest value, where it is positive, saturates at 7 / 8 of itself.

Source: the int4 weights of torchao's `Float8DynamicActivationInt4WeightConfig`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats import AffineFormat, AffineTensor
from aotrain.quantization.schemes.base import Encoded, TensorScheme, refuse_given

_AMAX_MIN = 1e-6


@dataclass(frozen=True, slots=True)
class Int4Float8Scheme(TensorScheme):
    """Symmetric int4 in groups along the last dimension, a scale of an eighth of the largest magnitude.

    Attributes:
        group_size: elements that share a scale.
    """

    group_size: int = 128

    @property
    def format(self) -> AffineFormat:
        """Codes and arithmetic; the scales are this scheme's own."""
        return AffineFormat(-8, 7, group_size=self.group_size, compute_dtype=torch.float32)

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
        return Encoded(*self.format.quantize(x, self._scale(x) if scale is None else scale))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return self.format.dequantize(AffineTensor(encoded.data, encoded.scale, None), dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.format.quant_min, self.format.quant_max

    def problem(self, shape: Sequence[int]) -> str | None:
        if shape[-1] and shape[-1] % self.group_size == 0:
            return None
        return f"the last dimension of {tuple(shape)} is no multiple of the group size {self.group_size}"

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        return torch.where(self.format.in_range(x, self._scale(x), None), grad, torch.zeros_like(grad))

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        amax = x.float().unflatten(-1, (-1, self.group_size)).abs().amax(dim=-1)
        # An infinity makes its block NaN when it is decoded, as in every other format.
        return (amax.clamp(min=_AMAX_MIN) * 0.125).masked_fill(~amax.isfinite(), torch.nan).to(x.dtype)
