"""The MX cast behind a Hadamard transform against formats.quantize_mx, bit for bit, under the interpreter."""

from dataclasses import replace

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    SCALE_FORMATS,
    Scaling,
    pack_float4,
    quantize_mx,
    to_blocked,
)
from aotrain.kernels.triton.mx_transform_cast import mx_transform_cast
from aotrain.kernels.triton.nvfp4_cast import measure
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

NEAREST = Scaling(element=FLOAT4_E2M1, scale=SCALE_FORMATS["e8m0_even"], block=BLOCKWISE_1X32, hadamard=32)
STOCHASTIC = replace(NEAREST, scale=SCALE_FORMATS["e8m0_rceil"], rounding="stochastic")
# [batch, contracted, rows]: one element, tails of both, several tiles of groups and of rows.
SHAPES = [(1, 1, 1), (2, 37, 66), (1, 160, 33)]


def assert_casts(x: torch.Tensor, scaling: Scaling) -> None:
    measures = None
    if scaling.rounding == "stochastic":
        measures = measure(x.reshape(-1, x.shape[-1]), 0, plain=False, transform=False, checksum=True)
    want = quantize_mx(x.mT.contiguous().cpu(), scaling)
    for tiles in (False, True):
        data, scale = mx_transform_cast(x, scaling.scale, measures, packed=tiles, blocked=tiles)
        assert_bitwise_equal(scale.cpu(), to_blocked(want.scale) if tiles else want.scale, what="scale")
        assert_bitwise_equal(data.cpu(), pack_float4(want.data) if tiles else want.data, what="data")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("scaling", [NEAREST, STOCHASTIC], ids=str)
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_shapes_and_dtypes(self, scaling: Scaling, dtype: torch.dtype):
        batch, contracted, rows = SHAPES[(torch.bfloat16, torch.float16, torch.float32).index(dtype)]
        x = torch.stack([adversarial_matrix(contracted, rows, dtype, seed) for seed in range(batch)])
        assert_casts(x, scaling)

    def test_strides(self, scaling: Scaling):
        assert_casts(torch.randn(1, 20, 33).mT, scaling)
        assert_casts(torch.randn(1, 40, 66)[:, :, ::2], scaling)

    def test_values_that_are_not_finite_fill_their_block_and_no_other(self, scaling: Scaling):
        x = torch.randn(1, 96, 8)
        x[0, 3, 0], x[0, 40, 1], x[0, 95, 2], x[0, 64, 3] = torch.inf, torch.nan, -torch.nan, -torch.inf
        assert_casts(x, scaling)
        bad = mx_transform_cast(x, scaling.scale, None)[1].view(torch.uint8)[0] == 255
        assert bad.nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", [NEAREST, STOCHASTIC], ids=str)
def test_on_a_gpu(scaling: Scaling):
    for shape in (*SHAPES, (1, 512, 768)):
        assert_casts(torch.randn(shape).bfloat16().cuda(), scaling)
