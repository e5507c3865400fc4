"""NVFP4 as a scheme: e2m1 codes, an e4m3 scale per 16 elements of a row, a float32 scale per matrix.

Checkpoint formats store the divisor `1 / global_scale` in float32, and not every float32 is the reciprocal of another.
A matrix's own global scale is therefore `1 / (1 / s)`, each quotient rounded, which is at most one bit from the s of
`formats.quantize_nvfp4`: its own reciprocal gives it back exactly, so what is trained is what the file holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.formats import (
    BLOCKWISE_1X16,
    TENSORWISE,
    Nvfp4Tensor,
    dequantize_nvfp4,
    nvfp4_global_scale,
    quantize_nvfp4,
)
from aotrain.formats.scaling import block_amax
from aotrain.quantization.schemes.base import Encoded, TensorScheme


@dataclass(frozen=True, slots=True)
class Nvfp4Scheme(TensorScheme):
    """NVFP4 in blocks of 1 x 16; the numbers are those of `formats.quantize_nvfp4` with the global scale above.

    Attributes:
        two_level: whether the matrix has a global scale of its own; without, it is 1.
    """

    two_level: bool = True

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        if zero_point is not None:
            raise ValueError(f"{self} got a zero_point; it has none: leave it out.")
        x = x.detach()
        if global_scale is None and not self.two_level:
            global_scale = torch.ones(1, device=x.device)
        elif global_scale is None and scale is None:
            global_scale = storable_global_scale(block_amax(x.float(), TENSORWISE))
        q = quantize_nvfp4(x, block=BLOCKWISE_1X16, scale=scale, global_scale=global_scale)
        return Encoded(q.data, q.scale, global_scale=q.global_scale)

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        assert encoded.global_scale is not None
        return dequantize_nvfp4(Nvfp4Tensor(encoded.data, encoded.scale, encoded.global_scale, BLOCKWISE_1X16), dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 15

    def problem(self, shape: Sequence[int]) -> str | None:
        if len(shape) >= 2 and shape[-1] % BLOCKWISE_1X16[1] == 0:
            return None
        return f"the last dimension of {tuple(shape)} is no multiple of 16: leave this layer out"


def storable_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Global scales, float32, of matrices with these largest magnitudes, that survive being stored as reciprocals."""
    return nvfp4_global_scale(amax).reciprocal().reciprocal()
