"""The corrected interpreter against torch over all values, and the proof that the correction is still needed."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from aotrain.formats import FLOAT8_E4M3, FLOAT8_E5M2, ElementFormat, round_nearest
from aotrain.testing import all_bfloat16_values, all_codes, assert_bitwise_equal

FORMATS = [FLOAT8_E4M3, FLOAT8_E5M2]
BINARY_OPERATIONS = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "less": torch.lt,
    "maximum": torch.maximum,
}


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)  # no `other`: an integer does not convert to float8
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _binary_kernel(x_ptr, y_ptr, z_ptr, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "subtract":
        z = x - y
    elif OPERATION == "multiply":
        z = x * y
    elif OPERATION == "less":
        z = x < y
    else:
        z = tl.maximum(x, y)
    tl.store(z_ptr + offsets, z, mask=mask)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(out_ptr + offsets, tl.fma(x, y, z))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), axis=0))


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def _binary(x: torch.Tensor, y: torch.Tensor, operation: str) -> torch.Tensor:
    z = torch.zeros(x.shape, dtype=torch.bool if operation == "less" else x.dtype)
    _binary_kernel[(1,)](x, y, z, x.numel(), OPERATION=operation, BLOCK=triton.next_power_of_2(x.numel()))
    return z


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.zeros(x.shape)
    _dot_kernel[(1,)](x, y, z, N=x.shape[0])
    return z


def _float8_midpoints(element: ElementFormat) -> torch.Tensor:
    """float32 midpoints of neighbouring finite values with their float32 neighbours, of both signs."""
    values = all_codes(element).float()
    values = values[values.isfinite() & (values >= 0)].sort().values
    middle = (values[1:] + values[:-1]) / 2
    infinity = torch.full_like(middle, torch.inf)
    near = torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    return torch.cat([near, -near])


def _awkward_float32(element: ElementFormat) -> torch.Tensor:
    limits = torch.tensor([element.max * 1.001, 1e4, 3e38, torch.inf, torch.nan, 1e-45, 0.0])
    return torch.cat([_float8_midpoints(element), limits, -limits, torch.randn(1000) * 3])


def _random_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, 4096).to(torch.bfloat16)
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-40, 1.0]).to(torch.bfloat16)
    return x, y


def _equal_up_to_nan(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise, except that bfloat16 NaNs differ in payload between torch's own operations."""
    nan = expected != expected
    assert torch.equal(actual != actual, nan)
    assert_bitwise_equal(actual.where(~nan, 0), expected.where(~nan, 0))


@pytest.mark.usefixtures("interpreter")
class TestCorrected:
    @pytest.mark.parametrize("element", FORMATS, ids=lambda element: element.name)
    def test_every_bfloat16_value_casts_to_float8_as_in_torch(self, element: ElementFormat) -> None:
        x = all_bfloat16_values()
        assert_bitwise_equal(_cast(x, element.dtype), round_nearest(x.float(), element))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("element", FORMATS, ids=lambda element: element.name)
    def test_ties_and_limits_cast_to_float8_as_in_torch(self, element: ElementFormat, dtype: torch.dtype) -> None:
        x = _awkward_float32(element).to(dtype)
        assert_bitwise_equal(_cast(x, element.dtype), round_nearest(x.float(), element))

    @pytest.mark.parametrize("element", FORMATS, ids=lambda element: element.name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_every_float8_code_widens_as_in_torch(self, element: ElementFormat, dtype: torch.dtype) -> None:
        codes = all_codes(element)
        _equal_up_to_nan(_cast(codes, dtype), codes.to(dtype))

    def test_float32_to_bfloat16_rounds_to_nearest_even(self) -> None:
        # Each bfloat16 value with all interesting lower halves: 0, just above 0, below, at and above the tie, all ones.
        high = torch.arange(65536, dtype=torch.int32)[:, None] << 16
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        x = (high | low).flatten().view(torch.float32)
        _equal_up_to_nan(_cast(x, torch.bfloat16), x.to(torch.bfloat16))

    def test_every_bfloat16_value_widens_exactly(self) -> None:
        x = all_bfloat16_values()
        _equal_up_to_nan(_cast(x, torch.float32), x.float())
        _equal_up_to_nan(_cast(x, torch.float16), x.to(torch.float16))

    def test_bfloat16_and_integers_convert_by_value(self) -> None:
        x = torch.tensor([0.0, 1.0, -2.5, 100.0, -300.0]).to(torch.bfloat16)
        assert_bitwise_equal(_cast(x, torch.int32), x.to(torch.int32))
        integers = torch.tensor([0, 1, -2, 257, 1000001], dtype=torch.int32)
        assert_bitwise_equal(_cast(integers, torch.bfloat16), integers.to(torch.bfloat16))

    @pytest.mark.parametrize("operation", BINARY_OPERATIONS)
    def test_bfloat16_arithmetic_as_in_torch(self, operation: str) -> None:
        x, y = _random_pairs()
        if operation == "maximum":  # tl.maximum ignores NaN, torch.maximum returns it
            x, y = x.nan_to_num(), y.nan_to_num()
        _equal_up_to_nan(_binary(x, y, operation), BINARY_OPERATIONS[operation](x, y))

    def test_bfloat16_dot_accumulates_exact_products(self) -> None:
        x, y = torch.randint(-8, 9, (2, 32, 32)).to(torch.bfloat16)
        assert_bitwise_equal(_dot(x, y), x.float() @ y.float())

    def test_reducing_bfloat16_is_an_error(self) -> None:
        x = torch.ones(16, dtype=torch.bfloat16)
        with pytest.raises(Exception, match="cannot reduce or scan bfloat16"):
            _sum_kernel[(1,)](x, torch.zeros(1, dtype=torch.bfloat16), N=16)

    def test_fused_multiply_add_rounds_once(self) -> None:
        x, y, noise = torch.randn(3, 4096)
        exact = x.double() * y.double()
        # Far apart, cancelling to the last bits, near a tie, and below the normal range.
        z = torch.cat([noise[:1024], -exact[1024:2048].float(), (noise * 1e9)[2048:3072], (noise * 1e-9)[3072:]])
        x[:64] *= 1e-25
        y[:64] *= 1e-20
        z[:64] *= 1e-40
        out = torch.zeros(4096)
        _fma_kernel[(1,)](x, y, z, out, N=4096)
        assert_bitwise_equal(out, torch.tensor([_nearest_float32(*each) for each in zip(x, y, z, strict=True)]))

    def test_maximum_and_minimum_ignore_nan(self) -> None:
        x, y = torch.tensor([[torch.nan, 1.0, torch.nan], [2.0, torch.nan, torch.nan]])
        _equal_up_to_nan(_binary(x, y, "maximum"), torch.fmax(x, y))

    def test_float32_arithmetic_is_untouched(self) -> None:
        x, y = torch.randn(2, 1000)
        assert_bitwise_equal(_binary(x, y, "multiply"), x * y)


def _nearest_float32(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> float:
    """x * y + z in rational arithmetic, rounded to the nearest float32, ties to even."""
    exact = Fraction(x.item()) * Fraction(y.item()) + Fraction(z.item())
    guess = torch.tensor(float(exact))
    near = torch.stack([guess, *(guess.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))])
    return min(near.tolist(), key=lambda value: (abs(Fraction(value) - exact), _is_odd(value)))


def _is_odd(value: float) -> bool:
    return bool(torch.tensor(value).view(torch.int32) & 1)


def _wrong_narrowing() -> bool:
    x = torch.randn(4096)
    return not torch.equal(_cast(x, torch.bfloat16), x.to(torch.bfloat16))


def _wrong_float8(element: ElementFormat) -> Callable[[], bool]:
    def check() -> bool:
        x = _float8_midpoints(element)
        return not torch.equal(_cast(x, element.dtype).view(torch.uint8), round_nearest(x, element).view(torch.uint8))

    return check


def _wrong_binary() -> bool:
    x, y = torch.randn(2, 64).to(torch.bfloat16)
    return not torch.equal(_binary(x, y, "add"), x + y)


def _wrong_maximum() -> bool:
    return bool(_binary(torch.tensor([torch.nan]), torch.ones(1), "maximum").isnan())


def _wrong_dot() -> bool:
    x, y = torch.eye(16).to(torch.bfloat16), torch.ones(16, 16).to(torch.bfloat16)
    return not torch.equal(_dot(x, y), y.float())


def _wrong_sum() -> bool:
    y = torch.zeros(1, dtype=torch.bfloat16)
    _sum_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), y, N=16)
    return y.item() != 16


STOCK_DEFECTS = {
    "fp32-to-bf16": _wrong_narrowing,
    "fp32-to-e4m3": _wrong_float8(FLOAT8_E4M3),
    "fp32-to-e5m2": _wrong_float8(FLOAT8_E5M2),
    "bf16-arithmetic": _wrong_binary,
    "maximum-of-nan": _wrong_maximum,
    "bf16-dot": _wrong_dot,
    "bf16-reduction": _wrong_sum,
}


@pytest.mark.parametrize("defect", STOCK_DEFECTS)
def test_the_stock_interpreter_still_has_the_defect(defect: str) -> None:
    with np.errstate(all="ignore"):
        wrong = STOCK_DEFECTS[defect]()
    assert wrong, (
        f"Triton {triton.__version__} computes {defect} correctly without our correction: remove that part of "
        "aotrain/testing/interpreter.py and of this table, and raise the lowest supported triton accordingly."
    )
