"""Q4_0 as a scheme: the grid of llama.cpp's 4-bit weights, for training that ends in a GGUF file."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats.q4_0 import BLOCK, Q40Tensor, dequantize_q4_0, quantize_q4_0
from aotrain.quantization.schemes.base import Encoded, TensorScheme, refuse_given


@dataclass(frozen=True, slots=True)
class Q40Scheme(TensorScheme):
    """Blocks of 32 along the last dimension; the numbers are those of `formats.q4_0`."""

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        refuse_given(self, scale=scale, zero_point=zero_point, global_scale=global_scale)
        return Encoded(*quantize_q4_0(x.detach()))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_q4_0(Q40Tensor(encoded.data, encoded.scale), dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 15

    def problem(self, shape: Sequence[int]) -> str | None:
        if shape[-1] and shape[-1] % BLOCK == 0:
            return None
        return f"the last dimension of {tuple(shape)} is no multiple of {BLOCK}: leave this layer out"
