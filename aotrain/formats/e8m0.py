"""E8M0 scales of the MX formats: a block's scale is 2^(byte - 127), byte 255 is NaN.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.1-5.4 and 6.3 (FLOOR); the other roundings are those
of NVIDIA's and AMD's training recipes, named as in torchao's `ScaleCalculationMode`.

The exponent of the scale, for a block whose largest magnitude is `amax` and an element format with exponent `emax`:

| rounding | exponent                                                                               |
|----------|----------------------------------------------------------------------------------------|
| `floor`  | floor(log2(amax)) - emax: the largest elements may saturate                            |
| `ceil`   | ceil(log2(amax)) - emax: nothing saturates, half the range may be unused               |
| `even`   | floor(log2(amax rounded to the element's mantissa)) - emax                             |
| `rceil`  | ceil(log2(amax * fp32(1 / max))): the smallest scale with which amax does not saturate |

A block whose amax is not finite gets byte 255, so all of it dequantizes to NaN; one whose amax is finite never does,
also where `even` rounds amax to 2^128 (docs/numerics.md, section 3).
"""

import torch

from aotrain.formats.element import ElementFormat

E8M0_ROUNDINGS = ("floor", "ceil", "even", "rceil")
E8M0_BIAS = 127
E8M0_NAN = 255

_MANTISSA_MASK = 0x7FFFFF
_HALF_OF_SMALLEST_NORMAL = 0x400000


def e8m0_from_amax(amax: torch.Tensor, element: ElementFormat, rounding: str) -> torch.Tensor:
    """E8M0 byte of each block.

    Args:
        amax: float32, largest magnitude of each block.
        element: format of the data.
        rounding: one of `E8M0_ROUNDINGS`.

    Returns:
        uint8 tensor of amax's shape.
    """
    if rounding not in E8M0_ROUNDINGS:
        raise ValueError(f"e8m0 rounding got {rounding!r}; want one of {', '.join(E8M0_ROUNDINGS)}.")
    if rounding == "rceil":
        # Clamped to 254: the quotient of a finite amax never reaches 255 because every element max is > 1.
        byte = _ceil_exponent_bits(amax * torch.tensor(1.0 / element.max, dtype=torch.float32, device=amax.device))
    else:
        bits = amax.view(torch.int32)
        if rounding == "even":
            bits = bits + (1 << (23 - element.mantissa_bits - 1))
        byte = bits >> 23
        if rounding == "ceil":
            byte = byte + ((bits & _MANTISSA_MASK) != 0)
        byte = (byte - element.max_exponent).clamp(min=0)
    return torch.where(amax.isfinite(), byte, E8M0_NAN).to(torch.uint8)


def decode_e8m0(byte: torch.Tensor) -> torch.Tensor:
    """float32 value 2^(byte - 127) of uint8 codes: 0 is the subnormal 2^-127, 255 is NaN."""
    return _power_of_two_from_biased(byte.to(torch.int32), byte == E8M0_NAN)


def e8m0_inverse(byte: torch.Tensor) -> torch.Tensor:
    """Exact float32 reciprocal 2^(127 - byte): byte 254 gives the subnormal 2^-127, 255 gives NaN."""
    return _power_of_two_from_biased(2 * E8M0_BIAS - byte.to(torch.int32), byte == E8M0_NAN)


def _power_of_two_from_biased(biased_exponent: torch.Tensor, is_nan: torch.Tensor) -> torch.Tensor:
    # A biased exponent of 0 means 2^-127 here, which float32 holds as the subnormal with the top mantissa bit set.
    bits = torch.where(biased_exponent > 0, biased_exponent << 23, _HALF_OF_SMALLEST_NORMAL)
    return torch.where(is_nan, torch.nan, bits.view(torch.float32))


def _ceil_exponent_bits(x: torch.Tensor) -> torch.Tensor:
    """Biased exponent of the smallest power of two >= x, for x >= 0; exact because it only looks at the bits."""
    bits = x.view(torch.int32)
    mantissa = bits & _MANTISSA_MASK
    exponent = bits >> 23
    # Subnormal x: 2^-127 (byte 0) covers up to the half of the smallest normal, 2^-126 (byte 1) the rest.
    threshold = torch.where(exponent == 0, _HALF_OF_SMALLEST_NORMAL, 0)
    return exponent + (mantissa > threshold)
