"""Codebooks for optimizer state: 8-bit and 4-bit maps from codes to values in [-1, 1] or [0, 1].

A block of state is `value * scale` with the block's largest magnitude as scale.

**Dynamic maps** (8-bit, and 4-bit signed) are log-spaced with linear steps inside each of D decades, D = 7 for 8 bits
and 3 for 4 bits. The largest code is 1.0, one code is 0, and decade d (0 the smallest) holds n_d = 2^d steps per sign
(signed) or 2^(d+1) steps (unsigned):

    value(d, k) = A_d + k * B_d      A_d = 10^(d-D+1) * (0.1 + 0.45 / n_d)      B_d = 10^(d-D+1) * 0.9 / n_d

A_d and B_d are float32 constants, the product and the sum are each rounded to float32. That makes the whole table
computable without a table, with two instructions, and with the same bits in torch, Triton and C++.

**The 4-bit unsigned map** is linear without a zero, (code + 1) / 16: a second moment of zero would divide by eps.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2.2; Li et al., "Memory
Efficient Optimizers with 4-bit States", NeurIPS 2023, section 4. The values agree with bitsandbytes' and torchao's maps
to float32 rounding and the codes have the same order, so their checkpoints convert by copying codes.
"""

import numpy as np
import torch

from aotrain.formats._tables import cached_table

_BUCKET_SHIFT = 15
_BUCKET_MASK = (1 << 17) - 1
_DECADES_OF_BITS = {8: 7, 4: 3}


@cached_table
def dynamic_codebook(signed: bool, device: torch.device, bits: int = 8) -> torch.Tensor:
    """The code values in ascending order, float32 [2^bits]. Cached and shared: do not modify."""
    if bits == 4 and not signed:
        return (torch.arange(1, 17, dtype=torch.float32) / 16).to(device)
    num_decades = _DECADES_OF_BITS[bits]
    decades = []
    for decade in range(num_decades):
        steps = 2**decade if signed else 2 ** (decade + 1)
        unit = 10.0 ** (decade - num_decades + 1)
        offset, stride = np.float32(unit * (0.1 + 0.45 / steps)), np.float32(unit * 0.9 / steps)
        decades.append(offset + np.arange(steps, dtype=np.float32) * stride)
    positive = np.concatenate(decades)
    negative = -positive[::-1] if signed else positive[:0]
    values = np.concatenate([negative, np.zeros(1, np.float32), positive, np.ones(1, np.float32)])
    return torch.from_numpy(values).to(device)


@cached_table
def _boundaries(signed: bool, device: torch.device, bits: int) -> torch.Tensor:
    """Midpoints between neighbouring codes, float32 [2^bits - 1]: fp32(0.5 * fp32(lower + upper))."""
    values = dynamic_codebook(signed, device, bits)
    return (values[:-1] + values[1:]) * 0.5


def encode_dynamic(x: torch.Tensor, signed: bool, bits: int = 8) -> torch.Tensor:
    """Nearest code of each value: the number of midpoints <= x, so that ties go to the larger value.

    Values outside the map's range take the outermost code; NaN takes the largest (the block's scale carries the NaN).

    Args:
        x: float32 of any shape, state divided by its block's scale.

    Returns:
        uint8 tensor of x's shape, one code per byte.
    """
    first, upper = _encode_tables(signed, x.device, bits)
    flat = x.contiguous().flatten()
    # A bucket of the first table spans 2^-8 of its values and holds at most one midpoint, so one comparison decides.
    code = first.index_select(0, (flat.view(torch.int32) >> _BUCKET_SHIFT) & _BUCKET_MASK)
    return (code + (flat >= upper.index_select(0, code))).to(torch.uint8).view(x.shape)


@cached_table
def _encode_tables(signed: bool, device: torch.device, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(code of the smallest value of each bucket of float32 patterns, int32 [2^17]; midpoint above each code [2^bits]).

    A bucket holds the float32 values that share their 17 upper bits. Search over 255 midpoints takes 40 ns per value on
    a CPU, the two lookups 5.
    """
    buckets = torch.arange(_BUCKET_MASK + 1, dtype=torch.int64)
    is_negative = buckets > _BUCKET_MASK // 2
    lowest = (buckets << _BUCKET_SHIFT) + torch.where(is_negative, (1 << _BUCKET_SHIFT) - 1, 0)
    # The bucket of -inf: its other members are NaNs that no arithmetic produces.
    lowest = torch.where(lowest == 0xFF807FFF, 0xFF800000, lowest)
    smallest = torch.where(lowest > 0x7FFFFFFF, lowest - (1 << 32), lowest).to(torch.int32).view(torch.float32)
    boundaries = _boundaries(signed, torch.device("cpu"), bits)
    first = torch.bucketize(smallest, boundaries, right=True).to(torch.int32)
    upper = torch.nn.functional.pad(boundaries, (0, 1), value=torch.inf)
    # Nothing lies above the last code, not even infinity: compare it with NaN.
    upper[-1] = torch.nan
    return first.to(device), upper.to(device)


def decode_dynamic(codes: torch.Tensor, signed: bool, bits: int = 8) -> torch.Tensor:
    """float32 values of uint8 codes, same shape."""
    return dynamic_codebook(signed, codes.device, bits).index_select(0, codes.flatten().int()).view(codes.shape)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte along the last dimension, the even element in the high half; uint8 [..., ceil(n / 2)].

    An odd length is padded with code 0.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack_nibbles(packed: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` codes along the last dimension of what `pack_nibbles` returned; uint8 [..., length]."""
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten(-2)[..., :length]
