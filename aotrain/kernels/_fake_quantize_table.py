"""Tables for fake quantization of bfloat16 to few codes with a symmetric mapping, made from the definition.

Where neither a bound nor a subnormal number is near, powers of two do not matter to `AffineFormat`: what becomes of an
element depends on the mantissa of its group's largest magnitude, 128 of them, and on how many bfloat16 numbers it lies
below. 512 levels reach far enough down for all that has another code than zero. csrc/cpu/fake_quantize.h says how the
kernel reads a table; groups whose largest magnitude is outside of `first_key..last_key` are computed instead.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from aotrain.formats import AffineFormat, AffineTensor, MappingType, ZeroPointDomain

_LEVELS, _MANTISSAS, _BIN, _MOST_STEPS = 512, 128, 16, 15
# Of the largest magnitude: 512 levels below it there are normal numbers, and nothing overflows above it.
_EXPONENTS = (-120, 120)


class Table(NamedTuple):
    """What the kernel gets.

    Attributes:
        rows: [128, 2, 32] int16: offsets of levels, then values.
        first_key: bits of the smallest largest magnitude of a group that the table is for.
        last_key: of the largest one.
        exponent: bits of the exponent that the values are for.
        nonzero: bits of the values that are not zero, which take another exponent.
        highest_step: elements beyond it saturate.
    """

    rows: torch.Tensor
    first_key: int
    last_key: int
    exponent: int
    nonzero: int
    highest_step: int


@functools.lru_cache(maxsize=64)
def lookup_table(form: AffineFormat, dtype: torch.dtype) -> Table | None:
    """The table of a format for a dtype; None where it has none."""
    if dtype != torch.bfloat16 or form.mapping is not MappingType.SYMMETRIC or form.quant_max - form.quant_min > 15:
        return None
    low, high = _exponents(form)
    if low > high:
        return None
    zero_point = 0 if form.domain is ZeroPointDomain.NONE else form.center
    lowest, highest = form.quant_min - zero_point, form.quant_max - zero_point
    exponent = _key(min(max(0, low), high), 0)
    # Every largest magnitude with this exponent, and each of the 512 numbers up to it, positive and negative.
    keys = exponent + torch.arange(_MANTISSAS, device="cpu")[:, None] - torch.arange(_LEVELS - 1, -1, -1, device="cpu")
    magnitudes = keys.to(torch.int16).view(torch.bfloat16)
    rows = replace(form, group_size=None)
    both = torch.cat([magnitudes, -magnitudes], dim=1)
    scale, zero_points = rows.parameters(both)
    steps, negative = (rows.steps(both, scale, zero_points).reshape(both.shape).int() - zero_point).chunk(2, dim=1)
    offsets = _offsets(steps)
    if offsets is None or not torch.equal(steps, -negative) or int(steps.max()) > min(_MOST_STEPS, -lowest):
        return None
    codes = torch.arange(_BIN, device="cpu")
    codes = torch.cat([-codes, codes]).clamp(lowest, highest) + zero_point
    encoded = AffineTensor(codes.to(form.code_dtype).expand(_MANTISSAS, -1), scale, zero_points)
    values = rows.dequantize(encoded, torch.bfloat16).view(torch.int16)
    return Table(
        rows=torch.stack([offsets.to(torch.int16), values], dim=1),
        first_key=_key(low, 0),
        last_key=_key(high, _MANTISSAS - 1),
        exponent=exponent,
        nonzero=sum(1 << i for i, code in enumerate(codes.tolist()) if code != zero_point),
        highest_step=highest,
    )


def _exponents(form: AffineFormat) -> tuple[int, int]:
    """Exponents of largest magnitudes whose scales and their reciprocals are normal numbers, with a margin of 2."""
    stored, half_range = torch.finfo(form.scale_dtype or torch.bfloat16), (form.quant_max - form.quant_min) / 2
    smallest = max(form.smallest_scale(form.compute_dtype or torch.bfloat16), stored.smallest_normal)
    low = math.ceil(math.log2(2 * smallest * half_range))
    high = math.floor(math.log2(stored.max / 4 * half_range))
    return max(low, _EXPONENTS[0]), min(high, _EXPONENTS[1])


def _key(exponent: int, mantissa: int) -> int:
    return (exponent + 127) * _MANTISSAS + mantissa


def _offsets(steps: torch.Tensor) -> torch.Tensor | None:
    """offsets[m, bin] with `steps[m, level] == (level + offsets[m, level // 16]) >> 9`; None where there are none."""
    bins = steps.unflatten(1, (-1, _BIN))
    first = bins[..., 0]
    # As many levels of a bin as have another step than its first one, which is one more.
    higher = (bins != first[..., None]).sum(-1)
    end = (torch.arange(_LEVELS // _BIN, device="cpu") + 1) * _BIN
    offsets = first * _LEVELS + _LEVELS - end + higher
    levels = torch.arange(_LEVELS, device="cpu")
    found = (levels + offsets.repeat_interleave(_BIN, dim=1)) >> 9
    return offsets if torch.equal(found, steps) and not steps[:, 0].any() else None
