"""Q4_0: 4-bit codes in blocks of 32 with a float16 scale, llama.cpp's most used weight format.

With `m` the element of largest magnitude of a block (the first of several), with its sign, and `d = m / -8` in float32:

    code = clamp(trunc(x / d + 8.5), 0, 15), computed in float64 from the float32 reciprocal of d
    x   ~= (code - 8) * fp16(d)                                       in float32

The element of largest magnitude takes code 0 exactly, so no value saturates by more than half a step, and the mean
squared error is a sixth below that of a symmetric scale of amax / 7.5. A block of zeros has d = 0 and code 8.

Dequantized values have up to 15 significant bits: float32 keeps them, bfloat16 does not. Quantizing them again in
float32 gives the same codes and scales, except where a scale is below the normal range of float16.

Source: the format's definition in the gguf Python package (`gguf.quants`), bit for bit.
"""

from typing import NamedTuple

import torch

BLOCK = 32


class Q40Tensor(NamedTuple):
    """`codes` uint8 0..15 in the shape of the tensor, `scale` float16 [..., K / 32]."""

    codes: torch.Tensor
    scale: torch.Tensor


def quantize_q4_0(x: torch.Tensor) -> Q40Tensor:
    """Quantize [..., K], K a multiple of 32, of any floating dtype.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if x.shape[-1] % BLOCK or x.shape[-1] == 0:
        raise ValueError(
            f"quantize_q4_0 got x of shape {tuple(x.shape)}; want a last dimension that is a multiple of 32."
        )
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    d = extreme / torch.full((), -8.0, device=x.device)
    inverse = torch.where(d == 0, torch.zeros_like(d), torch.ones_like(d) / d)
    codes = torch.trunc(blocks.double() * inverse.double() + 8.5).nan_to_num(8.0).clamp(0, 15).to(torch.uint8)
    return Q40Tensor(codes.reshape(x.shape), d.squeeze(-1).half())


def dequantize_q4_0(q: Q40Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(code - 8) * scale in float32, rounded once to `dtype`."""
    values = (q.codes.float().unflatten(-1, (-1, BLOCK)) - 8) * q.scale.float().unsqueeze(-1)
    return values.to(dtype).reshape(q.codes.shape)
