"""What the tests of formats compare with: search over all values of a format, and exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import torch

from aotrain.formats import ElementFormat, decode_elements
from aotrain.testing import all_codes


def finite_values(element: ElementFormat) -> np.ndarray:
    """All finite values of a format, ascending, without negative zero, float64."""
    decoded = decode_elements(all_codes(element), torch.float32, element).double()
    # The integer -128 is a code without use.
    return np.unique(decoded[decoded.isfinite() & (decoded.abs() <= element.max)].numpy() + 0.0)


def nearest_even(x: np.ndarray, element: ElementFormat) -> np.ndarray:
    """Nearest value of the format by search, ties to the even code, saturating."""
    values = finite_values(element)
    x = np.clip(x.astype(np.float64), values[0], values[-1])
    upper = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[upper - 1], values[upper]
    code = {value: index for index, value in enumerate(values[values >= 0])}
    low_is_even = np.array([code[abs(value)] % 2 == 0 for value in low.flat]).reshape(low.shape)
    below, above = x - low, high - x
    return np.where((below < above) | ((below == above) & low_is_even), low, high)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def e8m0_byte(amax: float, element: ElementFormat, rounding: str) -> int:
    """E8M0 byte of a finite amax, by the formulas of docs/numerics.md, section 3, with unbounded exponents."""
    exact = Fraction(amax)
    if exact == 0:
        return 0
    if rounding == "rceil":
        quotient = torch.tensor(amax) * torch.tensor(1 / element.max, dtype=torch.float32)
        exact = Fraction(quotient.item())
        if exact == 0:
            return 0
        floor = floor_log2(exact)
        return max(floor + (Fraction(2) ** floor != exact) + 127, 0)
    floor = floor_log2(exact)
    mantissa = exact / Fraction(2) ** floor
    if rounding == "ceil":
        floor += mantissa != 1
    if rounding == "even":
        floor += mantissa >= 2 - Fraction(1, 2 ** (element.mantissa_bits + 1))
    return max(floor - element.max_exponent + 127, 0)
