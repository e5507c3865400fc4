"""x / scale in the Adam kernel: exact enough for every comparison with a midpoint between codes, by enumeration."""

import pytest
import torch
import triton
import triton.language as tl

from aotrain.formats.codebook import _boundaries
from aotrain.kernels.triton.adam import _quotient


@triton.jit
def _quotient_kernel(x_ptr, scale_ptr, out_ptr, FACTOR: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, N)
    x = tl.load(x_ptr + rows)[:, None]
    tl.store(out_ptr + rows[:, None], _quotient(x, tl.load(scale_ptr + rows), FACTOR))


def check_quotients(middle: torch.Tensor, factor: float) -> None:
    """The hard cases: x / scale next to where the correctly rounded quotient changes from one side of `middle`.

    Let a middle have the integer mantissa B of 24 bits. The quotient A / D of two mantissas rounds to the middle from
    M = 2 B - 1 half steps on, and beyond it from M = 2 B + 1; below a power of two, from 4 B - 1 quarter steps on.
    A 2^k = M D + n puts a quotient n / (D 2^k) from that place, k = 24 (A >= D) or 25, one more for quarters. The
    computed quotient is wrong by less than n = 8 before it is rounded, so that |n| <= 64 is enough; for each there is
    at most one D.
    """
    mantissa = (middle.view(torch.int32) & 0x7FFFFF | 0x800000).long()
    numerators, scales, middles = [], [], []
    for bits, steps in ((24, 2 * mantissa - 1), (24, 2 * mantissa + 1), (25, 4 * mantissa - 1)):
        for k in (bits, bits + 1):
            inverse = torch.tensor([pow(int(step), -1, 1 << k) for step in steps])
            for n in (*range(-64, 0), *range(1, 65)):
                divisor = (-n * inverse) & ((1 << k) - 1)
                numerator = (steps * divisor + n) >> k
                fits = (divisor >> 23 == 1) & (numerator >> 23 == 1)
                numerators.append(numerator[fits])
                scales.append(divisor[fits])
                middles.append(middle[fits])
    a, scale, target = (torch.cat(each) for each in (numerators, scales, middles))
    # Bring x / scale next to the middle.
    x = (a.double() * torch.exp2(torch.round(torch.log2(target.double() * scale / a)))).float()
    pad = (0, triton.next_power_of_2(len(x)) - len(x))
    x, scale, target = (torch.nn.functional.pad(each, pad, value=1.0) for each in (x, scale.float(), target))
    out = torch.zeros_like(x)
    _quotient_kernel[(1,)](x, scale, out, FACTOR=factor, N=len(x))
    want = torch.sign(x / scale - target)
    assert len(x) > 1000
    assert set(want.tolist()) == {-1.0, 0.0, 1.0}
    assert (x / scale / target - 1).abs().max() < 1e-6
    assert torch.equal(torch.sign(out / factor - target), want)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quotients_compare_with_midpoints_as_correctly_rounded_ones(bits: int, signed: bool) -> None:
    middle = _boundaries(signed, torch.device("cpu"), bits)
    check_quotients(middle[middle > 0], 4.0)


@pytest.mark.usefixtures("interpreter")
def test_quotients_compare_with_float8_midpoints_as_correctly_rounded_ones() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    check_quotients((codes[1:] + codes[:-1]) / 2, 1.0)
