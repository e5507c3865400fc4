"""mx_cast and mx_cast_both: the definition's bits, for every shape and layout."""

from dataclasses import replace

import pytest
import torch

from aotrain.formats import FLOAT4_E2M1, FLOAT8_E4M3, SCALE_FORMATS, Scaling, quantize_mx
from aotrain.formats.scaling import BLOCKWISE_1X32, ROWWISE
from aotrain.kernels import mx_cast, mx_cast_both, scaled_cast, scaled_cast_both
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


def test_what_is_not_mx_is_refused():
    with pytest.raises(ValueError, match="want blocks of 1x32"):
        mx_cast(torch.ones(2, 2), replace(E4M3, block=ROWWISE))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_opcheck(scaling: Scaling):
    names = (scaling.element.name, scaling.scale.name, scaling.rounding, scaling.hadamard)
    torch.library.opcheck(torch.ops.aotrain.mx_cast, (torch.randn(5, 40), *names))
    torch.library.opcheck(torch.ops.aotrain.mx_cast_both, (torch.randn(5, 40), *names, *names))
