"""mx_cast and mx_cast_both: the definition's bits, for every shape and layout."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from aotrain.formats import FLOAT4_E2M1, FLOAT8_E4M3, SCALE_FORMATS, Scaling, quantize_mx
from aotrain.formats.scaling import BLOCKWISE_1X32, ROWWISE
from aotrain.kernels import cast_kernel_gap, mx_cast, mx_cast_both, scaled_cast, scaled_cast_both
from aotrain.kernels.mx_cast import _cuda, _cuda_both
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal

E4M3 = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
E2M1 = replace(E4M3, element=FLOAT4_E2M1)
SCALINGS = [E4M3, E2M1, replace(E2M1, rounding="stochastic"), replace(E2M1, rounding="stochastic", hadamard=32)]
SHAPES = [(1, 1), (37, 100), (3, 5, 33), (0, 32), (64, 0)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_definition(shape, scaling):
    x = torch.randn(shape).bfloat16()
    for operand in (x, x.mT.contiguous().mT, x.mT):
        want = quantize_mx(operand.contiguous(), scaling)
        for got in (mx_cast(operand, scaling), scaled_cast(operand, scaling)):
            assert_bitwise_equal(got.data, want.data)
            assert_bitwise_equal(got.scale, want.scale)
            assert got.data.is_contiguous()
            assert got.scaling == scaling


def test_both_are_two_casts():
    x = torch.randn(37, 70)
    for q, q_t in (mx_cast_both(x, E4M3, SCALINGS[3]), scaled_cast_both(x, E4M3, SCALINGS[3])):
        for got, want in ((q, mx_cast(x, E4M3)), (q_t, mx_cast(x.t(), SCALINGS[3]))):
            assert_bitwise_equal(got.data, want.data)
            assert_bitwise_equal(got.scale, want.scale)


def _names(scaling: Scaling) -> tuple[str, str, str, int]:
    return scaling.element.name, scaling.scale.name, scaling.rounding, scaling.hadamard


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_gw_hp", "mxfp4"])
def test_gpu_implementation_has_a_kernel_for_every_cast_of_a_recipe(name: str):
    x = torch.randn(40, 36).bfloat16()
    recipe = RECIPES[name]
    scalings = {s for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight) for s in (gemm.lhs, gemm.rhs) if s}
    for scaling in scalings:
        assert cast_kernel_gap(scaling) is None
        for operand in (x, x.t(), x.view(2, 20, 36), x[:, ::2], x[:0]):
            want = quantize_mx(operand.contiguous(), scaling)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                data, scale = _cuda(operand, *_names(scaling))
            assert_bitwise_equal(data, want.data)
            assert_bitwise_equal(scale, want.scale)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("scaling", "scaling_t"),
    [(E4M3, E4M3), (E4M3, E2M1), (SCALINGS[2], SCALINGS[2]), (SCALINGS[2], SCALINGS[3])],
    ids=str,
)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x[:0]])
def test_gpu_implementation_of_both(view, scaling: Scaling, scaling_t: Scaling):
    x = view(torch.randn(37, 70))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = _cuda_both(x, *_names(scaling), *_names(scaling_t))
    q, q_t = quantize_mx(x.contiguous(), scaling), quantize_mx(x.t().contiguous(), scaling_t)
    for one, want in zip(got, (q.data, q.scale, q_t.data, q_t.scale), strict=True):
        assert_bitwise_equal(one, want)


@pytest.mark.usefixtures("interpreter")
def test_gpu_implementation_of_gradients_reads_the_key_once(monkeypatch):
    from aotrain.kernels.triton import nvfp4_cast

    measured = []
    monkeypatch.setattr(
        nvfp4_cast, "measure", lambda x, *a, _of=nvfp4_cast.measure, **k: measured.append(x) or _of(x, *a, **k)
    )
    recipe = RECIPES["mxfp4"]
    grad, grad_t, x_t = recipe.grad_input.lhs, recipe.grad_weight.lhs, recipe.grad_weight.rhs
    _cuda_both(torch.randn(2, 33), *_names(grad), *_names(grad_t))
    assert len(measured) == 1
    _cuda(torch.randn(33, 2).t(), *_names(x_t))
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (replace(E4M3, rounding="stochastic"), "stochastic rounding or transforms .*float8_e4m3fn"),
        (replace(E4M3, hadamard=32), "stochastic rounding or transforms .*float8_e4m3fn"),
        (replace(E2M1, hadamard=16), "a transform of 16"),
    ],
    ids=str,
)
def test_gpu_implementation_says_what_it_lacks(scaling: Scaling, words: str):
    assert re.search(words, cast_kernel_gap(scaling) or "")
    x = torch.randn(4, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = _cuda_both(x, *_names(E2M1), *_names(scaling))
    want = quantize_mx(x.t().contiguous(), scaling)
    assert_bitwise_equal(got[2], want.data)
    assert_bitwise_equal(got[3], want.scale)


def test_gpu_implementation_without_a_kernel_warns_once():
    with pytest.warns(UserWarning, match=r"aotrain::mx_cast .*slower.*float6_e3m2fn"):
        _cuda(torch.randn(4, 32), "float6_e3m2fn", "e8m0_floor", "nearest", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _cuda(torch.randn(4, 32), "float6_e3m2fn", "e8m0_floor", "nearest", 0)


def test_what_is_not_mx_is_refused():
    with pytest.raises(ValueError, match="want blocks of 1x32"):
        mx_cast(torch.ones(2, 2), replace(E4M3, block=ROWWISE))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_opcheck(scaling: Scaling):
    names = _names(scaling)
    torch.library.opcheck(torch.ops.aotrain.mx_cast, (torch.randn(5, 40), *names))
    torch.library.opcheck(torch.ops.aotrain.mx_cast_both, (torch.randn(5, 40), *names, *names))
