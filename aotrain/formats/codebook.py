"""Dynamic 8-bit codebooks for optimizer state: a log-spaced map with linear steps inside each decade.

A code stands for a value in [-1, 1] (signed) or [0, 1] (unsigned); a block of state is `value * scale` with the block's
largest magnitude as scale. The largest code is 1.0, one code is 0, and decade d (0 the smallest of 7) holds n_d = 2^d
steps per sign (signed) or 2^(d+1) steps (unsigned):

    value(d, k) = A_d + k * B_d      A_d = 10^(d-6) * (0.1 + 0.45 / n_d)      B_d = 10^(d-6) * 0.9 / n_d

A_d and B_d are float32 constants, the product and the sum are each rounded to float32. That makes the whole table
computable without a table, with two instructions, and with the same bits in torch, Triton and C++.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2.2. The values agree with
bitsandbytes' and torchao's maps to float32 rounding and the codes have the same order, so their checkpoints convert by
copying codes.
"""

from functools import lru_cache

import numpy as np
import torch

_DECADES = 7


@lru_cache(maxsize=16)
def dynamic_codebook(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 code values in ascending order, float32 [256]. Cached and shared: do not modify."""
    decades = []
    for decade in range(_DECADES):
        steps = 2**decade if signed else 2 ** (decade + 1)
        unit = 10.0 ** (decade - 6)
        offset, stride = np.float32(unit * (0.1 + 0.45 / steps)), np.float32(unit * 0.9 / steps)
        decades.append(offset + np.arange(steps, dtype=np.float32) * stride)
    positive = np.concatenate(decades)
    negative = -positive[::-1] if signed else positive[:0]
    values = np.concatenate([negative, np.zeros(1, np.float32), positive, np.ones(1, np.float32)])
    return torch.from_numpy(values).to(device)


@lru_cache(maxsize=16)
def _boundaries(signed: bool, device: torch.device) -> torch.Tensor:
    """Midpoints between neighbouring codes, float32 [255]: fp32(0.5 * fp32(lower + upper))."""
    values = dynamic_codebook(signed, device)
    return (values[:-1] + values[1:]) * 0.5


def encode_dynamic(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """Nearest code of each value: the number of midpoints <= x, so that ties go to the larger value.

    Values outside the map's range take the outermost code; NaN takes the largest (the block's scale carries the NaN).

    Args:
        x: float32 of any shape, state divided by its block's scale.

    Returns:
        uint8 tensor of x's shape.
    """
    return torch.bucketize(x, _boundaries(signed, x.device), right=True).to(torch.uint8)


def decode_dynamic(codes: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 values of uint8 codes, same shape."""
    return dynamic_codebook(signed, codes.device)[codes.long()]
