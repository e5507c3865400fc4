"""Integer formats against their formulas, each operation done in float64 and rounded to the dtype it is done in.

A float64 result of one operation on float32, bfloat16 or float16 numbers, rounded again, is the one rounding of the
exact result (Figueroa 1995: 53 >= 2 * 24 + 2 bits).
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain, integer_format
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SYMMETRIC, NO_CLIPPING, ASYMMETRIC = MappingType
INT, FLOAT, NONE = ZeroPointDomain
KINDS = [(mapping, domain) for mapping in MappingType for domain in (INT, FLOAT)] + [
    (mapping, NONE) for mapping in (SYMMETRIC, NO_CLIPPING)
]
CODES = [(lo, hi) for bits in range(1, 9) for lo, hi in ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1))]
ODD_CODES = [(-7, 7), (-127, 127), (1, 15), (-6, 2), (-128, 126)]


def rounded(x, dtype: torch.dtype):
    """float64 numbers to the nearest of a dtype, ties to even, by the definition of a floating-point number."""
    info = torch.finfo(dtype)
    x = np.asarray(x, dtype=np.float64)
    _, exponent = np.frexp(x)
    step = np.ldexp(info.eps, np.maximum(exponent - 1, math.frexp(info.smallest_normal)[1] - 1))
    near = np.where(np.isfinite(x), np.rint(np.where(np.isfinite(x), x, 0) / step) * step, x)
    return np.where(np.abs(near) > info.max, np.sign(near) * math.inf, near)


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a == b else torch.float32


def expected(x: torch.Tensor, f: AffineFormat) -> dict[str, np.ndarray | None]:
    """Scales, zero points, codes, values and which elements saturate, of [groups, elements]."""
    compute, stored = f.compute_dtype or x.dtype, f.scale_dtype or x.dtype
    both = wider(compute, stored)

    def in_(dtype, value):
        return rounded(value, dtype)

    lo, hi, data = f.quant_min, f.quant_max, in_(compute, x.double().numpy())
    mn, mx = data.min(-1), data.max(-1)
    if f.domain is not FLOAT:
        mn, mx = np.where(np.isnan(mn), mn, np.minimum(mn, 0)), np.where(np.isnan(mx), mx, np.maximum(mx, 0))
    middle = (hi + lo + 1) / 2
    zero = np.zeros_like(mn)
    if f.domain is FLOAT or f.mapping is ASYMMETRIC:
        scale = in_(compute, in_(compute, mx - mn) / (hi - lo))
    elif f.mapping is SYMMETRIC:
        scale = in_(compute, np.maximum(-mn, mx) / ((hi - lo) / 2))
    else:
        below = in_(compute, mn / lo) if lo < 0 else zero
        scale = np.maximum(below, in_(compute, mx / hi) if hi > 0 else zero)
    tiny = torch.finfo(compute).smallest_normal
    scale = np.maximum(scale, tiny if f.eps is None else max(in_(compute, f.eps), tiny))
    if f.domain is FLOAT:
        zero = in_(stored, in_(compute, mn + in_(compute, scale * middle)))
    elif f.domain is INT and f.mapping is ASYMMETRIC:
        zero = np.clip(lo - np.rint(in_(compute, mn / scale)), lo, hi)
    elif f.domain is INT:
        zero = zero + math.trunc(middle)
    info = torch.finfo(stored)
    # A zero point that is a value is a multiple of the scale, which stays what it was unless it would be 0.
    smallest = info.smallest_normal * (info.eps if f.domain is FLOAT else 1.0)
    scale = np.maximum(in_(stored, scale), smallest)
    broken = ~(np.isfinite(mn) & np.isfinite(mx) & np.isfinite(scale) & np.isfinite(zero))
    scale, zero = np.where(broken, math.nan, scale), np.where(broken, math.nan if f.domain is FLOAT else 0, zero)
    each, shift = scale[:, None], zero[:, None]
    if f.domain is FLOAT:
        floor = in_(both, shift - in_(both, each * middle))
        steps = np.rint(in_(both, in_(both, data - floor) / each))
    else:
        steps = np.rint(in_(both, data * in_(both, 1 / each))) + shift
    codes = np.clip(np.nan_to_num(steps), lo, hi) + 0.0  # integers have one zero
    if f.domain is FLOAT:
        values = in_(both, in_(both, in_(compute, codes - middle) * each) + shift)
    else:
        values = in_(both, (codes - shift) * each)
    inside = (steps >= lo) & (steps <= hi)
    return {"scale": scale, "zero": zero, "codes": codes, "values": in_(x.dtype, values), "inside": inside}


def check(x: torch.Tensor, f: AffineFormat) -> None:
    groups = x.reshape(-1, f.group_size or x.shape[-1])
    with np.errstate(all="ignore"):
        want = expected(groups, f)
    q = f.quantize(x)
    assert q.scale.dtype == (f.scale_dtype or x.dtype)
    np.testing.assert_array_equal(q.scale.double().numpy(), want["scale"].reshape(q.scale.shape))
    assert (q.zero_point is not None) == f.has_zero_point
    zeros = torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point
    np.testing.assert_array_equal(zeros.double().numpy(), want["zero"].reshape(q.scale.shape))
    assert q.codes.dtype == f.code_dtype
    np.testing.assert_array_equal(q.codes.double().numpy(), want["codes"].reshape(x.shape))
    values = f.dequantize(q, x.dtype)
    wanted = torch.from_numpy(want["values"].reshape(x.shape))
    assert_bitwise_equal(values, wanted.to(x.dtype).masked_fill(wanted.isnan(), math.nan))
    inside = f.in_range(x, q.scale, q.zero_point)
    np.testing.assert_array_equal(inside.numpy(), want["inside"].reshape(x.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mapping", "domain"), KINDS, ids=lambda kind: kind.name)
def test_every_mapping_domain_and_range_of_codes(mapping: MappingType, domain: ZeroPointDomain, dtype: torch.dtype):
    x = adversarial_matrix(35, 48, dtype)
    one_sided = torch.randn(4, 48).abs().to(dtype)
    x = torch.cat([x, one_sided, -one_sided, one_sided + 100])
    for (lo, hi), group_size in itertools.product((*CODES, *ODD_CODES), (16, None)):
        check(x, AffineFormat(lo, hi, group_size=group_size, mapping=mapping, domain=domain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mapping", "domain"), KINDS, ids=lambda kind: kind.name)
def test_dtypes_of_scales_and_arithmetic(mapping: MappingType, domain: ZeroPointDomain, dtype: torch.dtype):
    x = adversarial_matrix(35, 32, dtype)
    for scale_dtype, compute_dtype in itertools.product((None, *DTYPES), (None, torch.float32)):
        for eps in (None, 1e-12, 0.03):
            f = AffineFormat(-8, 7, 8, mapping, domain, scale_dtype, compute_dtype, eps)
            check(x, f)
            check(x, replace(f, quant_min=0, quant_max=255))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda mapping: mapping.name)
def test_every_value_of_16_bits_beside_a_larger_one(mapping: MappingType, dtype: torch.dtype):
    """All roundings that a code can come from: each value in a group of its own with its bound."""
    x = all_bfloat16_values().view(dtype)
    x = torch.stack([x, x * 1.5, x * -0.375, x * 7.0], dim=-1)
    for lo, hi in ((-8, 7), (-128, 127), (0, 15), (-2, 1)):
        check(x, AffineFormat(lo, hi, 4, mapping))


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_arbitrary_numbers(data, dtype, kind, bits, signed, groups, size):
    numbers = st.floats(width=32, allow_subnormal=True)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=2 * groups * size, max_size=2 * groups * size)))
    f = replace(integer_format(bits, group_size=size, signed=signed), mapping=kind[0], domain=kind[1])
    check(x.to(dtype).view(2, groups * size), f)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mapping", "domain"), KINDS, ids=lambda kind: kind.name)
def test_a_nan_or_infinity_takes_its_group_and_no_other(mapping, domain, dtype: torch.dtype):
    x = torch.randn(4, 24).to(dtype)
    x[0, 3], x[1, 9], x[2, 23], x[3, 0] = math.nan, math.inf, -math.inf, -math.nan
    x[3, 1] = math.inf
    for lo, hi in ((-8, 7), (0, 255), (3, 9)):
        f = AffineFormat(lo, hi, 8, mapping, domain)
        check(x, f)
        nan = f.dequantize(f.quantize(x), dtype).isnan().view(4, 3, 8)
        assert torch.equal(nan.all(-1), nan.any(-1))
        assert nan.all(-1).sum() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mapping", MappingType, ids=lambda mapping: mapping.name)
def test_zeros_and_what_is_too_small_for_a_scale(mapping: MappingType, dtype: torch.dtype):
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0], [tiny, -tiny, tiny / 4, 0.0]]).to(dtype)
    for bits, scale_dtype in itertools.product((1, 4, 8), (None, *DTYPES)):
        f = integer_format(bits, mapping=mapping, scale_dtype=scale_dtype)
        check(x, f)
        values = f.dequantize(f.quantize(x), dtype)
        assert_bitwise_equal(values[0], torch.zeros(4, dtype=dtype))
        assert values.isfinite().all()


def test_a_scale_that_overflows_breaks_its_group():
    x = torch.tensor([[60000.0, -60000.0], [1.0, -1.0]]).half()
    f = integer_format(8, mapping=ASYMMETRIC)
    check(x, f)
    assert f.dequantize(f.quantize(x), torch.float16).isnan().tolist() == [[True, True], [False, False]]
    check(x.float() * 1e6, integer_format(4, scale_dtype=torch.float16))


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (2, 3, 64), (32,)], ids=str)
def test_shapes(shape: tuple[int, ...]):
    x = torch.randn(shape)
    f = integer_format(4, group_size=32)
    q = f.quantize(x)
    assert q.codes.shape == x.shape
    assert q.scale.shape == (*shape[:-1], shape[-1] // 32)
    assert f.dequantize(q, torch.bfloat16).shape == x.shape
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(f.quantize(strided).codes, q.codes)


def test_given_scales_are_used():
    x = torch.randn(4, 16)
    f = integer_format(4, group_size=8)
    own = f.quantize(x)
    doubled = f.quantize(x, own.scale * 2)
    assert torch.equal(
        doubled.codes, torch.round(x.view(4, 2, 8) * (1 / (own.scale * 2)[..., None])).view(4, 16).char()
    )
    shifted = f.quantize(x, own.scale, torch.full((4, 2), 3, dtype=torch.int32))
    assert torch.equal(shifted.codes, (f.steps(x, own.scale, None) + 3).clamp(-8, 7).view(4, 16).char())


def test_never_clipping_is_idempotent():
    x = torch.randn(8, 64)
    f = integer_format(4, group_size=32, mapping=NO_CLIPPING)
    values = f.dequantize(f.quantize(x), torch.float32)
    assert torch.equal(f.quantize(values).codes, f.quantize(x).codes)
    assert f.in_range(x, *f.parameters(x)).all()


def test_refusals():
    f = integer_format(4, group_size=8)
    for x, message in (
        (torch.randn(2, 8).double(), "float64; want float32, bfloat16 or float16"),
        (torch.randn(2, 12), "groups of 8; want .* multiple"),
        (torch.tensor(1.0), "multiple of the group size"),
    ):
        with pytest.raises(ValueError, match=message):
            f.quantize(x)
    with pytest.raises(ValueError, match="last dimension"):
        integer_format(4).quantize(torch.empty(3, 0))
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"scale of shape \(2,\).*want \(2, 1\)"):
        f.quantize(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"zero point of \(1, 1\)"):
        f.quantize(x, torch.ones(2, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="without a zero point"):
        replace(f, domain=FLOAT).quantize(x, torch.ones(2, 1))
    for arguments, message in (
        ({"quant_min": 3, "quant_max": 3}, r"codes 3\.\.3"),
        ({"quant_min": -128, "quant_max": 200}, "at most 8 bits"),
        ({"group_size": 0}, "group_size=0"),
        ({"mapping": ASYMMETRIC, "domain": NONE}, "without zero points"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
        ({"compute_dtype": torch.int8}, "compute_dtype=torch.int8"),
        ({"eps": 0.0}, "eps=0.0; want a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(f, **arguments)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            integer_format(bits)
