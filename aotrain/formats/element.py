"""Element formats: one frozen row per number format, the only place its constants are written.

A finite value of a format with E exponent bits, M mantissa bits and bias B is

    (-1)^s * 2^(e - B) * (1 + m / 2^M)        for e > 0      (normal)
    (-1)^s * 2^(1 - B) * (m / 2^M)            for e = 0      (subnormal)

Integers are the formats without exponent bits: all values are subnormal, and B and M are chosen for a spacing of 1.
torch has no dtype for one element of 6 or 4 bits: those are stored as codes, one per byte, sign | exponent | mantissa
in the low bits of a uint8 (`aotrain.formats.packing` puts two 4-bit codes into a byte, as hardware reads them).

Sources: OCP 8-bit Floating Point Specification 1.0 (e4m3fn, e5m2); OCP Microscaling Formats (MX) Specification 1.0,
section 5.3 (e3m2, e2m3, e2m1: every code is a finite number); Noune et al., "8-bit Numerical Formats for Deep Neural
Networks", arXiv:2206.02915 (the `fnuz` pair: no infinity, no negative zero, the code 0x80 is NaN).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ElementFormat:
    """One number format.

    Attributes:
        name: the field's name of the format, equal to torch's dtype name where torch has one.
        dtype: torch dtype that stores one element; uint8 means a code, see `stored_as_codes`.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field, without the implicit bit.
        bias: exponent bias.
        max: largest finite value; casts saturate to it.
        has_inf: whether the format encodes infinities. Casts never produce one (docs/numerics.md, section 2).
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    has_inf: bool

    @property
    def bits(self) -> int:
        """Width of a code: sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def stored_as_codes(self) -> bool:
        """Whether data is uint8 codes in the low bits of a byte, for want of a torch dtype that means the format."""
        return self.dtype == torch.uint8

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value, shared by all subnormals."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value."""
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def max_exponent(self) -> int:
        """Exponent of `max`, called `emax` in the MX specification."""
        return math.frexp(self.max)[1] - 1


FLOAT8_E4M3 = ElementFormat(
    name="float8_e4m3fn",
    dtype=torch.float8_e4m3fn,
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    max=448.0,
    has_inf=False,
)
FLOAT8_E5M2 = ElementFormat(
    name="float8_e5m2",
    dtype=torch.float8_e5m2,
    exponent_bits=5,
    mantissa_bits=2,
    bias=15,
    max=57344.0,
    has_inf=True,
)
FLOAT8_E4M3FNUZ = ElementFormat(
    name="float8_e4m3fnuz",
    dtype=torch.float8_e4m3fnuz,
    exponent_bits=4,
    mantissa_bits=3,
    bias=8,
    max=240.0,
    has_inf=False,
)
FLOAT8_E5M2FNUZ = ElementFormat(
    name="float8_e5m2fnuz",
    dtype=torch.float8_e5m2fnuz,
    exponent_bits=5,
    mantissa_bits=2,
    bias=16,
    max=57344.0,
    has_inf=False,
)
INT8 = ElementFormat(
    name="int8",
    dtype=torch.int8,
    exponent_bits=0,
    mantissa_bits=7,
    bias=-6,
    max=127.0,
    has_inf=False,
)
FLOAT6_E3M2 = ElementFormat(
    name="float6_e3m2fn",
    dtype=torch.uint8,
    exponent_bits=3,
    mantissa_bits=2,
    bias=3,
    max=28.0,
    has_inf=False,
)
FLOAT6_E2M3 = ElementFormat(
    name="float6_e2m3fn",
    dtype=torch.uint8,
    exponent_bits=2,
    mantissa_bits=3,
    bias=1,
    max=7.5,
    has_inf=False,
)
FLOAT4_E2M1 = ElementFormat(
    name="float4_e2m1fn",
    dtype=torch.uint8,
    exponent_bits=2,
    mantissa_bits=1,
    bias=1,
    max=6.0,
    has_inf=False,
)
# Never scaled, so not in the table below: here so that stochastic rounding of a bfloat16 weight uses the same rule as
# every other cast.
BFLOAT16 = ElementFormat(
    name="bfloat16",
    dtype=torch.bfloat16,
    exponent_bits=8,
    mantissa_bits=7,
    bias=127,
    max=torch.finfo(torch.bfloat16).max,
    has_inf=True,
)

ELEMENT_FORMATS: dict[str, ElementFormat] = {
    row.name: row
    for row in (
        *(FLOAT8_E4M3, FLOAT8_E5M2, FLOAT8_E4M3FNUZ, FLOAT8_E5M2FNUZ),
        *(INT8, FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1),
    )
}
