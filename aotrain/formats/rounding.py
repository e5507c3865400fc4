"""Rounding of float32 values to an element format: nearest-even and stochastic, both saturating.

Policy (docs/numerics.md, section 2): NaN becomes the format's positive quiet NaN whatever its sign and payload; values
beyond the format's range, infinities included, become the largest finite value with their sign. The clamp is explicit
because torch's own float8 casts changed between releases: overflow gave NaN in torch 2.11 and saturates in 2.13. NaNs
are made one value because their sign is an accident of the machine: inf * 0 is -NaN on x86 and +NaN elsewhere. A format
without a NaN (integers, 6 and 4 bits) stores +0 instead: there the block's scale carries it.
"""

import math

import torch

from aotrain.formats.element import ElementFormat

NOISE_BITS = 16


def round_nearest(x: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    """Round to the nearest value of the format, ties to even, saturating.

    Args:
        x: float32 tensor of any shape.
        element: the target format.

    Returns:
        Tensor of `element.dtype` and x's shape.
    """
    if element.stored_as_codes:
        steps, _, exponent = _steps_of_ulp(x, element)
        return _encode(x, steps.round(), exponent, element)  # ties to the even step, which has the even code
    bounded = x.nan_to_num(nan=math.nan).clamp_(-element.max, element.max)
    if not element.dtype.is_floating_point:  # the conversion truncates, and NaN has no code
        bounded = bounded.round_().nan_to_num_(nan=0.0)
    return bounded.to(element.dtype)


def round_stochastic(x: torch.Tensor, element: ElementFormat, noise: torch.Tensor) -> torch.Tensor:
    """Round to one of the two neighbouring values with probability proportional to the distance from the other.

    With `ulp` the spacing of the format at |x| and `frac` the fractional part of |x| / ulp, the magnitude is rounded up
    when `frac + noise / 2^16 >= 1`. Values of the format are returned unchanged whatever the noise. The expectation
    over uniform noise is x, up to 2^-16 ulp for formats that drop more than 16 bits of a float32.

    Args:
        x: float32 tensor of any shape.
        element: the target format.
        noise: integer tensor of x's shape with values in [0, 2^16).

    Returns:
        Tensor of `element.dtype` and x's shape.
    """
    steps, ulp, exponent = _steps_of_ulp(x, element)
    whole = steps.floor()
    whole += (steps - whole) + noise.double() * 2.0**-NOISE_BITS >= 1.0
    if element.stored_as_codes:
        return _encode(x, whole, exponent, element)
    rounded = (whole * ulp).float()
    nan = math.nan if element.dtype.is_floating_point else 0.0
    return torch.where(x.isnan(), nan, torch.copysign(rounded, x)).to(element.dtype)


def _steps_of_ulp(x: torch.Tensor, element: ElementFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(steps, ulp, exponent) with saturated |x| = steps * ulp, both float64, and the exponent of x's binade.

    In float64, scaling by a power of two, the floor and the sum with the noise are exact. All subnormals of the format
    count as one binade, that of its smallest normal value.
    """
    magnitude = x.abs().clamp(max=element.max)
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=element.min_exponent)
    ulp = _power_of_two(exponent - element.mantissa_bits)
    return magnitude.double() / ulp, ulp, exponent


def _encode(x: torch.Tensor, steps: torch.Tensor, exponent: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    """uint8 codes of the values sign(x) * steps * ulp(exponent), for whole steps.

    Codes ascend with the magnitude by one per step, 2^M steps per binade: counting them from the smallest normal's
    binade needs no distinction of subnormals, nor of a value that was rounded up into the next binade.
    """
    magnitude_code = ((exponent - element.min_exponent) << element.mantissa_bits) + steps.nan_to_num().int()
    code = magnitude_code | (x.signbit().int() << (element.bits - 1))
    return code.masked_fill(x.isnan(), 0).to(torch.uint8)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exact float64 2^exponent for int tensors in [-1022, 1023]; vectorised exp2 is not exact on every CPU."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
