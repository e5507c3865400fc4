"""The C++ kernel of fake quantization against AffineFormat: bit for bit, on every instruction set."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain, integer_format
from aotrain.formats.scale_gradient import follows_maximum, gradient_with_scales
from aotrain.kernels import _fake_quantize_cpu as cpu
from aotrain.kernels._fake_quantize_table import lookup_table
from aotrain.kernels.fake_quantize import _arguments, kernel_gap
from aotrain.kernels.fake_quantize_marked import _reference_marked, saturated_shape
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from tests.kernels.native import build_or_skip, isa_or_skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANGES = [(-1, 0), (-2, 1), (-4, 3), (-8, 7), (-7, 7), (-128, 127), (0, 1), (0, 15), (0, 255), (-6, 2)]
KINDS = [(mapping, ZeroPointDomain.INT) for mapping in MappingType] + [
    (MappingType.SYMMETRIC, ZeroPointDomain.NONE),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, ZeroPointDomain.NONE),
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_or_skip("fake_quantize", cpu)


@pytest.fixture(params=list(cpu.ISAS))
def isa(request: pytest.FixtureRequest) -> str:
    return isa_or_skip("fake_quantize", cpu, request.param)


def check(x: torch.Tensor, form: AffineFormat, isa: str) -> None:
    if kernel_gap(form, x.dtype) is not None:
        return
    assert cpu.problem(x) is None
    q = form.quantize(x)
    assert_bitwise_equal(cpu.fake_quantize(x, form, isa=isa), form.dequantize(q, x.dtype), what=f"values, {form}")
    inside = form.in_range(x, q.scale, q.zero_point)
    grad = torch.randn(x.shape).to(x.dtype)
    want = grad.where(inside, 0)
    assert_bitwise_equal(cpu.fake_quantize(x, form, grad, isa=isa), want, what=f"gradient, {form}")
    marked = grad.clone()
    assert cpu.fake_quantize(x, form, grad, out=grad, isa=isa) is grad
    assert_bitwise_equal(grad, want, what=f"gradient in place, {form}")
    saturated = torch.full(saturated_shape(x.shape, form.group_size), -1, dtype=torch.int32)
    values = cpu.fake_quantize(x, form, saturated=saturated, isa=isa)
    assert_bitwise_equal(values, form.dequantize(q, x.dtype), what=f"values beside marks, {form}")
    assert_bitwise_equal(saturated, _reference_marked(x, *_arguments(form))[1], what=f"marks, {form}")
    cpu.clear_saturated_(marked, saturated, form.group_size, isa=isa)
    assert_bitwise_equal(marked, want, what=f"gradient by marks, {form}")
    if follows_maximum(form):
        grad = torch.randn(x.shape).to(dtype=x.dtype)
        want = gradient_with_scales(grad, x, form)
        got = cpu.fake_quantize(x, form, grad, with_scales=True, isa=isa)
        assert_bitwise_equal(got, want, what=f"gradient with scales, {form}")
        assert cpu.fake_quantize(x, form, grad, out=grad, with_scales=True, isa=isa) is grad
        assert_bitwise_equal(grad, want, what=f"gradient with scales in place, {form}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mapping", "domain"), KINDS, ids=lambda kind: kind.name)
def test_every_format(mapping: MappingType, domain: ZeroPointDomain, dtype: torch.dtype, isa: str):
    x = torch.cat([adversarial_matrix(35, 96, dtype), torch.randn(4, 96).abs().to(dtype)])
    for (lo, hi), group_size in itertools.product(RANGES, (32, None)):
        check(x, AffineFormat(lo, hi, group_size, mapping, domain), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda mapping: mapping.name)
def test_dtypes_of_scales_and_arithmetic(mapping: MappingType, dtype: torch.dtype, isa: str):
    x = adversarial_matrix(35, 32, dtype)
    for scale_dtype, compute_dtype in itertools.product((None, *DTYPES), (None, *DTYPES)):
        for eps in (None, 1e-12, 0.03):
            check(x, AffineFormat(-8, 7, 16, mapping, ZeroPointDomain.INT, scale_dtype, compute_dtype, eps), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda mapping: mapping.name)
def test_every_value_of_16_bits_beside_a_larger_one(mapping: MappingType, dtype: torch.dtype, isa: str):
    x = all_bfloat16_values()
    x = x.view(torch.float16) if dtype == torch.float16 else x.to(dtype)
    x = torch.stack([x, x * 1.5, x * -0.375, x * 7.0], dim=-1)
    for bits in (2, 4, 8):
        check(x, integer_format(bits, group_size=4, mapping=mapping), isa)
    # Every value as a part of the same bound, where rounding twice matters.
    finite = x[:, 0][x[:, 0].abs() <= 7.5]
    finite = torch.cat([finite, finite.new_tensor([7.5, -7.5]), finite.new_zeros(-(finite.numel() + 2) % 62)]).view(
        -1, 62
    )
    bound = torch.tensor([[7.5, -7.5]]).to(dtype)
    for factor in (1.0, 0.8, 1.3, 1.7):
        rows = torch.cat([finite, bound.expand(len(finite), 2)], dim=1) * factor
        for bits in (2, 3, 4, 8):
            check(rows, integer_format(bits, group_size=64, mapping=mapping), isa)


def test_every_mantissa_of_every_exponent_beside_every_smaller_number(isa: str):
    """By table where there is one, and at its ends, where groups are computed."""
    levels = torch.arange(640)
    for form in (
        integer_format(4, group_size=64),
        integer_format(2, group_size=64, scale_dtype=torch.float16),
        AffineFormat(0, 15, 64, scale_dtype=torch.float32, compute_dtype=torch.float32, eps=1e-12),
    ):
        table = lookup_table(form, torch.bfloat16)
        assert table is not None
        middle = (table.first_key + table.last_key) // 2
        for first in (table.first_key - 300, middle - 64, table.last_key - 100):
            keys = torch.arange(first, first + 400, 3)[:, None]
            below = (keys - levels).clamp(min=0).unflatten(1, (-1, 32))
            signs = torch.where(torch.arange(32) % 3 == 1, -(2**15), 0)
            rows = torch.cat([keys[:, None].expand(-1, below.shape[1], 32), below], dim=-1)
            rows[..., 1:32] = 0
            x = (rows + torch.cat([signs, signs.roll(1)])).clamp(max=0x7F7F).to(torch.int16).view(torch.bfloat16)
            check(x.flatten(1), form, isa)
            check(-x.flatten(1), form, isa)


def test_which_formats_have_a_table():
    for bits, has in ((1, True), (2, True), (4, True), (5, False), (8, False)):
        assert (lookup_table(integer_format(bits, group_size=32), torch.bfloat16) is not None) == has
    assert lookup_table(integer_format(4, mapping=MappingType.ASYMMETRIC), torch.bfloat16) is None
    assert lookup_table(integer_format(4), torch.float16) is None
    assert lookup_table(integer_format(4, eps=1e30), torch.bfloat16).exponent > (100 + 127) << 7
    assert lookup_table(integer_format(4, eps=1e38), torch.bfloat16) is None  # no scale follows its group


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nans_infinities_and_overflows_take_their_group_and_no_other(dtype: torch.dtype, isa: str):
    x = torch.randn(24, 64).to(dtype)
    x[0, 3], x[1, 40], x[2, 63], x[3, 0], x[3, 1] = math.nan, math.inf, -math.inf, -math.nan, math.inf
    limit = torch.finfo(dtype).max
    x[20, 7], x[20, 9], x[21, 0], x[22, 1] = limit, -limit, limit, -limit
    for mapping, bits, group_size in itertools.product(MappingType, (1, 2, 4, 8), (8, 64, None)):
        for scale_dtype in (None, torch.float16):
            check(x, integer_format(bits, group_size=group_size, mapping=mapping, scale_dtype=scale_dtype), isa)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 31, 33, 48, 64, 100, 255, 300, 2049])
@pytest.mark.parametrize("groups", [1, 3, 16, 17, 37])
def test_tails(size: int, groups: int, isa: str):
    for dtype in DTYPES:
        x = torch.randn(2, size * groups).to(dtype)
        for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
            check(x, integer_format(4, group_size=size, mapping=mapping), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_finite_or_zero_beside_scales(dtype: torch.dtype, isa: str):
    form = integer_format(3, group_size=32)
    x = torch.randn(40, 96).to(dtype)
    x[30] = 0
    x[31] = torch.finfo(dtype).smallest_normal
    x[32, 5] = x[32, 3] = -x[32].abs().max()  # the first of several
    grad = torch.randn(40, 96).to(dtype)
    grad[0, 3], grad[1, 40], grad[2, 63] = math.nan, math.inf, -math.inf
    grad[3:6] = torch.finfo(dtype).max
    grad[6], grad[7] = 0.0, -0.0
    want = gradient_with_scales(grad, x, form)
    assert_bitwise_equal(cpu.fake_quantize(x, form, grad, with_scales=True, isa=isa), want)


def test_threads_do_not_change_the_bits():
    x = torch.randn(300, 1152).bfloat16()
    isa = list(cpu.ISAS)[cpu.library()[0].aotrain_fake_quantize_isa()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for group_size in (32, None):
            check(x, integer_format(4, group_size=group_size), isa)
    finally:
        torch.set_num_threads(threads)


def test_without_the_library_the_definition_runs():
    script = (
        "import torch\nfrom aotrain.formats import integer_format\nfrom aotrain.kernels import _fake_quantize_cpu\n"
        "from aotrain.kernels.fake_quantize import fake_quantize_affine\n"
        "f = integer_format(4)\nx = torch.randn(5, 7)\n"
        "assert torch.equal(fake_quantize_affine(x, f), f.dequantize(f.quantize(x), x.dtype))\n"
        "print(_fake_quantize_cpu.problem(x))\n"
    )
    environment = {**os.environ, "AOTRAIN_NO_NATIVE": "1", "PYTHONPATH": str(Path(cpu.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "AOTRAIN_NO_NATIVE is set" in result.stdout, result.stderr
