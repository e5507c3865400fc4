"""Block shapes, amax and scales: docs/numerics.md, section 3."""

import math
import struct

import pytest
import torch

from aotrain.formats import (
    COLWISE,
    ELEMENT_FORMATS,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    scale_shape,
)
from aotrain.formats.scaling import block_amax, expand_blocks, floor_to_power_of_two, scales_from_amax
from aotrain.testing import assert_bitwise_equal

BLOCKS = [TENSORWISE, ROWWISE, COLWISE, (1, 32), (128, 128), (2, 3)]
SHAPES = [(1, 1), (3, 31), (37, 100), (128, 256), (0, 8), (8, 0), (2, 5, 33)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_amax_is_the_loop_over_blocks(shape: tuple[int, ...], block: tuple[int, int]):
    x = torch.randn(shape)
    amax = block_amax(x, block)
    assert amax.shape == scale_shape(shape, block)
    matrices = x.reshape(-1, *shape[-2:]) if x.numel() else x.new_zeros(0, *shape[-2:])
    rows, columns = (size if block[i] == -1 else block[i] for i, size in enumerate(shape[-2:]))
    want = [
        [
            [matrix[r : r + rows, c : c + columns].abs().max() for c in range(0, shape[-1], columns)]
            for r in range(0, shape[-2], rows)
        ]
        for matrix in matrices
    ]
    if x.numel():
        assert_bitwise_equal(amax, torch.tensor(want).reshape(amax.shape))
    else:
        assert not amax.any()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_element_gets_the_scale_of_its_block(block: tuple[int, int]):
    shape = (37, 100)
    scale = torch.arange(math.prod(scale_shape(shape, block))).view(scale_shape(shape, block)).float()
    expanded = expand_blocks(scale, shape, block).expand(shape)
    rows, columns = (size if block[i] == -1 else block[i] for i, size in enumerate(shape))
    for r, c in [(0, 0), (36, 99), (1, 31), (5, 32), (17, 64)]:
        assert expanded[r, c] == scale[r // rows, c // columns]


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2], ids=lambda element: element.name)
def test_float32_scale_is_the_quotient_in_float64(element):
    amax = torch.cat([torch.rand(1000) * 100, torch.tensor([1e-38, 1e-12, 9.9999e-13, 3.4e38, 1.0])])
    scale, inv_scale = scales_from_amax(amax, Scaling(element=element))
    to_float32 = [struct.unpack("f", struct.pack("f", element.max / max(value, 1e-12)))[0] for value in amax.tolist()]
    assert inv_scale.tolist() == to_float32
    assert scale.tolist() == [struct.unpack("f", struct.pack("f", 1.0 / value))[0] for value in to_float32]


@pytest.mark.parametrize("name", SCALE_FORMATS)
@pytest.mark.parametrize("element", ELEMENT_FORMATS.values(), ids=lambda element: element.name)
def test_zero_blocks_have_a_finite_positive_scale(name: str, element):
    scale, inv_scale = scales_from_amax(torch.zeros(3), Scaling(element=element, scale=SCALE_FORMATS[name]))
    assert bool(inv_scale.isfinite().all())
    assert bool((inv_scale > 0).all())
    assert bool((scale.float() > 0).all())


def test_non_finite_blocks():
    amax = torch.tensor([math.inf, math.nan])
    for name in ("float32", "float32_pow2"):
        scale, inv_scale = scales_from_amax(amax, Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS[name]))
        assert inv_scale[0] == 0
        assert scale[0] == math.inf
        assert scale[1].isnan()
        assert inv_scale[1].isnan()


def test_power_of_two_floor_never_goes_up():
    """exp2(floor(log2(x))) in float32 goes up just below most powers of two; clearing the mantissa does not."""
    powers = torch.exp2(torch.arange(-100, 120).double()).float()
    below = torch.nextafter(powers, torch.zeros_like(powers))
    assert_bitwise_equal(floor_to_power_of_two(powers), powers)
    assert_bitwise_equal(floor_to_power_of_two(below), powers / 2)
    assert floor_to_power_of_two(torch.tensor(math.nan)).isnan()
    assert floor_to_power_of_two(torch.tensor(0.0)) == 0


def test_vectors_and_bad_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        scale_shape((8,), ROWWISE)
    with pytest.raises(ValueError, match="want two sizes"):
        Scaling(element=FLOAT8_E4M3, block=(0, 1))
    with pytest.raises(ValueError, match="nearest"):
        Scaling(element=FLOAT8_E4M3, rounding="up")
