"""The Triton kernel of fake quantization against AffineFormat, bit for bit, under the interpreter; GPU twins last."""

import itertools
import math

import pytest
import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain, integer_format
from aotrain.formats.scale_gradient import follows_maximum, gradient_with_scales
from aotrain.kernels.fake_quantize import kernel_gap
from aotrain.kernels.triton import fake_quantize as kernels
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANGES = [(-1, 0), (-8, 7), (-7, 7), (-128, 127), (0, 255)]


def check(x: torch.Tensor, form: AffineFormat, device: str = "cpu") -> None:
    if kernel_gap(form, x.dtype) is not None:
        return
    q = form.quantize(x)
    values = kernels.fake_quantize(x.to(device), form)
    assert_bitwise_equal(values, form.dequantize(q, x.dtype), what=f"values, {form}")
    inside = form.in_range(x, q.scale, q.zero_point)
    for dtype in (x.dtype, torch.float32):
        grad = torch.randn(x.shape).to(dtype)
        want, got = grad.where(inside, 0), grad.to(device, copy=True)
        assert_bitwise_equal(kernels.fake_quantize(x.to(device), form, got), want, what=f"gradient, {form}")
        assert kernels.fake_quantize(x.to(device), form, got, out=got) is got
        assert_bitwise_equal(got, want, what=f"gradient in place, {form}")
        if follows_maximum(form) and kernels.fits_tile(form.group_size or x.shape[-1]):
            want, got = gradient_with_scales(grad, x, form), grad.to(device, copy=True)
            assert kernels.fake_quantize(x.to(device), form, got, out=got, with_scales=True) is got
            assert_bitwise_equal(got, want, what=f"gradient with scales, {form}")


def cases(dtype: torch.dtype):
    """A matrix with every kind of group, beside a format."""
    x = torch.cat([adversarial_matrix(35, 64, dtype), torch.randn(4, 64).abs().to(dtype)])
    x[8, 3], x[15, 40], x[22, 63], x[29, 0], x[29, 1] = math.nan, math.inf, -math.inf, -math.nan, math.inf
    limit = torch.finfo(dtype).max
    x[36, 7], x[36, 9], x[37, 0] = limit, -limit, limit
    for mapping, (lo, hi) in itertools.product(MappingType, RANGES):
        yield x, AffineFormat(lo, hi, 32, mapping)
    integers, none = ZeroPointDomain.INT, ZeroPointDomain.NONE
    for scale_dtype, compute_dtype in itertools.product((None, *DTYPES), (None, torch.float32)):
        yield x, AffineFormat(-8, 7, None, MappingType.ASYMMETRIC, integers, scale_dtype, compute_dtype, 0.03)
        yield x, AffineFormat(0, 15, 16, MappingType.SYMMETRIC, none, scale_dtype, compute_dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formats_and_dtypes(dtype: torch.dtype):
    for x, form in cases(dtype):
        check(x, form)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "CONFIGS", (kernels.Config(16384, 4, 4),))
    x = all_bfloat16_values().view(dtype)
    x = torch.stack([x, x * 1.5, x * -0.375, x * 7.0], dim=-1)
    for mapping in MappingType:
        check(x, integer_format(4, group_size=4, mapping=mapping))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (5, 100), (2, 1025), (1, 9000)])
def test_tails_and_long_groups(rows: int, columns: int):
    for dtype, mapping in itertools.product(DTYPES, (MappingType.SYMMETRIC, MappingType.ASYMMETRIC)):
        check(torch.randn(rows, columns).to(dtype), integer_format(8, mapping=mapping))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_finite_beside_scales(dtype: torch.dtype):
    form = integer_format(3, group_size=32)
    x, grad = torch.randn(12, 64).to(dtype), torch.randn(12, 64).to(dtype)
    x[8] = 0
    x[9] = torch.finfo(dtype).smallest_normal
    x[10, 5] = x[10, 3] = -x[10].abs().max()  # the first of several
    grad[0, 3], grad[1, 40], grad[2, 63] = math.nan, math.inf, -math.inf
    grad[3:6] = torch.finfo(dtype).max
    grad[6], grad[7] = 0.0, -0.0
    got, want = kernels.fake_quantize(x, form, grad, with_scales=True), gradient_with_scales(grad, x, form)
    # The interpreter gives a NaN that only passes other bits.
    assert torch.equal(got.isnan(), want.isnan())
    assert_bitwise_equal(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype):
    for x, form in cases(dtype):
        check(x, form, "cuda")
    for columns in (31, 1025, 9000):
        check(torch.randn(5, columns).to(dtype), integer_format(8, mapping=MappingType.ASYMMETRIC), "cuda")
