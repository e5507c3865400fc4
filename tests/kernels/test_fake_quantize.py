"""The fake-quantization ops: schema, fakes, shapes, refusals, and which implementation a tensor takes."""

import itertools
import warnings

import pytest
import torch

from aotrain.formats import AffineFormat, MappingType, ZeroPointDomain, integer_format
from aotrain.formats.scale_gradient import gradient_with_scales
from aotrain.kernels import _dispatch, _fake_quantize_cpu
from aotrain.kernels import fake_quantize as ops
from aotrain.kernels.fake_quantize import (
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_affine_backward_,
    fake_quantize_affine_backward_with_scales,
    fake_quantize_affine_backward_with_scales_,
)
from aotrain.kernels.fake_quantize_marked import clear_saturated_, fake_quantize_affine_marked
from aotrain.testing import assert_bitwise_equal

FORMATS = {
    "int4-g32": integer_format(4, group_size=32),
    "int8-asymmetric-row": integer_format(8, mapping=MappingType.ASYMMETRIC),
    "uint4-float-g32": AffineFormat(0, 15, 32, MappingType.ASYMMETRIC, ZeroPointDomain.FLOAT, torch.bfloat16),
    "int1-never-clipping": integer_format(1, mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
}


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    _dispatch.warn_slow.cache_clear()


def expected(grad: torch.Tensor, x: torch.Tensor, form: AffineFormat) -> tuple[torch.Tensor, torch.Tensor]:
    q = form.quantize(x)
    return form.dequantize(q, x.dtype), grad.where(form.in_range(x, q.scale, q.zero_point), 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32), (64,), (0, 32), (4, 0)], ids=str)
def test_equals_the_definition(shape: tuple[int, ...], name: str):
    form = FORMATS[name]
    if shape[-1] == 0 and form.group_size is None:
        pytest.skip("a whole row of no elements has no scale")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = torch.randn((*shape, 2)).to(dtype)
        grad = torch.randn(shape)
        for x in (base[..., 0].contiguous(), base[..., 0]):
            for g in (grad, grad.to(dtype)):
                values, want = expected(g, x, form)
                got = fake_quantize_affine(x, form)
                assert_bitwise_equal(got, values)
                assert got.is_contiguous()
                assert_bitwise_equal(fake_quantize_affine_backward(g, x, form), want)
                for own in (g.clone(), torch.stack([g, g], dim=-1)[..., 0]):
                    assert fake_quantize_affine_backward_(own, x, form) is own
                    assert_bitwise_equal(own, want)
                marked, saturated = fake_quantize_affine_marked(x, form)
                assert_bitwise_equal(marked, values)
                for own in (g.clone(), torch.stack([g, g], dim=-1)[..., 0], g.double()):
                    assert clear_saturated_(own, saturated, form) is own
                    assert_bitwise_equal(own, want.to(own.dtype))


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 32), (64,), (0, 32)], ids=str)
def test_gradients_of_scales_equal_the_definition(shape: tuple[int, ...]):
    form = FORMATS["int4-g32"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = torch.randn((*shape, 2)).to(dtype)
        grad = torch.randn(shape)
        for x, g in itertools.product((base[..., 0].contiguous(), base[..., 0]), (grad, grad.to(dtype))):
            want = gradient_with_scales(g, x, form)
            assert_bitwise_equal(fake_quantize_affine_backward_with_scales(g, x, form), want)
            for own in (g.clone(), torch.stack([g, g], dim=-1)[..., 0]):
                assert fake_quantize_affine_backward_with_scales_(own, x, form) is own
                assert_bitwise_equal(own, want)


def test_gradients_of_scales_need_a_scale_that_follows_the_maximum():
    x = torch.randn(2, 32)
    for name in ("int8-asymmetric-row", "uint4-float-g32", "int1-never-clipping"):
        for call in (fake_quantize_affine_backward_with_scales, fake_quantize_affine_backward_with_scales_):
            with pytest.raises(ValueError, match="want a symmetric mapping without zero points"):
                call(x, x, FORMATS[name])
    with pytest.raises(ValueError, match=r"grad of shape \(1, 32\)"):
        fake_quantize_affine_backward_with_scales(x[:1], x, FORMATS["int4-g32"])


def test_marks_are_bits_of_whole_words():
    form = integer_format(4, group_size=48)
    x = torch.zeros(2, 96)
    x[0, 5], x[0, 40], x[0, 48 + 31], x[1, 47] = 7.5, 7.5, 3.75, 15
    x[1, 48:] = torch.nan
    _, saturated = fake_quantize_affine_marked(x, form)
    assert saturated.tolist() == [[[1 << 5, 1 << 8], [-(1 << 31), 0]], [[0, 1 << 15], [-1, 0xFFFF]]]
    with pytest.raises(ValueError, match=r"of shape \(2, 96\); want int32 \(2, 2, 2\)"):
        clear_saturated_(x, saturated[:1], form)


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name: str):
    x, grad = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    arguments = ops._arguments(FORMATS[name])
    for operand in (x, torch.randn(64, 4).bfloat16().t()):
        torch.library.opcheck(torch.ops.aotrain.fake_quantize_affine, (operand, *arguments))
        torch.library.opcheck(torch.ops.aotrain.fake_quantize_affine_backward, (grad, operand, *arguments))
        torch.library.opcheck(torch.ops.aotrain.fake_quantize_affine_backward_, (grad.clone(), operand, *arguments))
        torch.library.opcheck(torch.ops.aotrain.fake_quantize_affine_marked, (operand, *arguments))
        if name == "int4-g32":
            with_scales = torch.ops.aotrain.fake_quantize_affine_backward_with_scales
            torch.library.opcheck(with_scales, (grad, operand, *arguments))
            with_scales_ = torch.ops.aotrain.fake_quantize_affine_backward_with_scales_
            torch.library.opcheck(with_scales_, (grad.clone(), operand, *arguments))
    _, saturated = fake_quantize_affine_marked(x, FORMATS[name])
    clear = (grad.clone(), saturated, FORMATS[name].group_size)
    torch.library.opcheck(torch.ops.aotrain.clear_saturated_, clear)


def test_two_runs_are_equal():
    x = torch.randn(33, 320).bfloat16()
    for form in FORMATS.values():
        assert_bitwise_equal(fake_quantize_affine(x, form), fake_quantize_affine(x, form))


def test_refusals():
    form = FORMATS["int4-g32"]
    for call in (fake_quantize_affine, lambda x, form: fake_quantize_affine_backward(x, x, form)):
        with pytest.raises(ValueError, match="multiple of the group size"):
            call(torch.randn(2, 40), form)
        with pytest.raises(ValueError, match="float64"):
            call(torch.randn(2, 32, dtype=torch.float64), form)
    with pytest.raises(ValueError, match=r"grad of shape \(2, 32\); want that of x, \(4, 32\)"):
        fake_quantize_affine_backward(torch.randn(2, 32), torch.randn(4, 32), form)


def test_the_op_takes_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    calls = []
    kernel = _fake_quantize_cpu.fake_quantize
    monkeypatch.setattr(_fake_quantize_cpu, "problem", lambda x: None)
    monkeypatch.setattr(_fake_quantize_cpu, "fake_quantize", lambda *a, **k: calls.append(a[1]) or torch.zeros(4, 64))
    for form in FORMATS.values():
        fake_quantize_affine(torch.randn(4, 64), form)
    assert calls == [FORMATS["int4-g32"], FORMATS["int8-asymmetric-row"]]
    assert kernel is not _fake_quantize_cpu.fake_quantize


@pytest.mark.usefixtures("interpreter")
def test_gpu_implementation_runs_the_kernel():
    x, grad = torch.randn(2, 3, 64).bfloat16().transpose(0, 1), torch.randn(3, 2, 64).bfloat16()
    for name in ("int4-g32", "int8-asymmetric-row"):
        form = FORMATS[name]
        values, want = expected(grad, x, form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_bitwise_equal(ops._cuda(x, *ops._arguments(form)), values)
            assert_bitwise_equal(ops._cuda_backward(grad, x, *ops._arguments(form)), want)
            own = grad.clone()
            ops._cuda_backward_(own, x, *ops._arguments(form))
            assert_bitwise_equal(own, want)
    form = FORMATS["int4-g32"]
    want, own = gradient_with_scales(grad, x, form), grad.clone()
    assert_bitwise_equal(ops._cuda_with_scales(grad, x, *ops._arguments(form)), want)
    ops._cuda_with_scales_(own, x, *ops._arguments(form))
    assert_bitwise_equal(own, want)
    assert ops._cuda(x[:0], *ops._arguments(FORMATS["int4-g32"])).shape == (0, 2, 64)


@pytest.mark.usefixtures("interpreter")
def test_gpu_implementation_of_scales_of_long_groups_is_the_definition():
    x, form = torch.randn(1, 8200), integer_format(4)
    with pytest.warns(UserWarning, match="groups this long"):
        got = ops._cuda_with_scales(x, x, *ops._arguments(form))
    assert_bitwise_equal(got, gradient_with_scales(x, x, form))


@pytest.mark.parametrize(("name", "reason"), [("uint4-float-g32", "are values"), ("int1-never-clipping", "one sign")])
def test_gpu_implementation_without_a_kernel_warns_once(name: str, reason: str):
    x, arguments = torch.randn(2, 64), ops._arguments(FORMATS[name])
    with pytest.warns(UserWarning, match=f"aotrain::fake_quantize_affine .*slower.*{reason}"):
        values = ops._cuda(x, *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_bitwise_equal(ops._cuda(x, *arguments), values)
    assert_bitwise_equal(values, expected(x, x, FORMATS[name])[0])
