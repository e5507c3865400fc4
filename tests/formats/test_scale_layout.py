"""The tiles of block scales against an index-by-index definition, and their sizes against torch's own checks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_1X32,
    blocked_size,
    from_blocked,
    scale_shape,
    to_blocked,
)
from aotrain.testing import assert_bitwise_equal

SHAPES = [(1, 1), (128, 4), (129, 5), (200, 7), (300, 12), (32, 3), (256, 1)]
DTYPES = [torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn]


def place(row: int, column: int, columns: int) -> int:
    """Byte of a scale as cuBLAS documents it: tiles of 128 x 4, 512 bytes each, row by row."""
    tile = (row // 128) * -(-columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_scale_is_in_its_place_and_the_rest_is_zero(shape: tuple[int, int], dtype: torch.dtype):
    rows, columns = shape
    scale = torch.randint(1, 256, shape, dtype=torch.uint8)
    blocked = to_blocked(scale.view(dtype))
    assert blocked.dtype == dtype
    want = torch.zeros(blocked_size(rows, columns), dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            want[place(row, column, columns)] = scale[row, column]
    assert_bitwise_equal(blocked.view(torch.uint8), want)
    assert_bitwise_equal(from_blocked(blocked, rows, columns).view(torch.uint8), scale)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 0, 4), (0, 130, 5)], ids=str)
def test_empty(shape: tuple[int, ...]):
    blocked = to_blocked(torch.empty(shape, dtype=torch.uint8))
    assert blocked.shape == (*shape[:-2], blocked_size(*shape[-2:]))
    assert from_blocked(blocked, *shape[-2:]).shape == shape


def test_batches_and_strides():
    scale = torch.randint(0, 256, (2, 3, 5, 130), dtype=torch.uint8).transpose(-1, -2)
    blocked = to_blocked(scale)
    assert blocked.shape == (2, 3, blocked_size(130, 5))
    for i in range(2):
        for j in range(3):
            assert_bitwise_equal(blocked[i, j], to_blocked(scale[i, j].contiguous()))
    assert_bitwise_equal(from_blocked(blocked, 130, 5), scale.contiguous())


@pytest.mark.parametrize(("m", "k", "n"), [(1, 32, 16), (130, 160, 48), (257, 512, 144)])
@pytest.mark.parametrize("fp4", [False, True], ids=["mxfp8", "nvfp4"])
def test_sizes_are_those_that_torch_wants(m: int, k: int, n: int, fp4: bool):
    block, scale_dtype = (BLOCKWISE_1X16, torch.float8_e4m3fn) if fp4 else (BLOCKWISE_1X32, torch.float8_e8m0fnu)
    dtype, width = (torch.float4_e2m1fn_x2, k // 2) if fp4 else (torch.float8_e4m3fn, k)
    sizes = [blocked_size(*scale_shape((rows, k), block)) for rows in (m, n)]
    with FakeTensorMode():
        a, b = (torch.empty(rows, width, dtype=dtype, device="cuda") for rows in (m, n))
        a_scale, b_scale = (torch.empty(size, dtype=scale_dtype, device="cuda") for size in sizes)
        out = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16)
        assert out.shape == (m, n)
        short = torch.empty(sizes[0] - 1, dtype=scale_dtype, device="cuda")
        with pytest.raises(RuntimeError, match=str(sizes[0])):
            torch._scaled_mm(a, b.t(), short, b_scale, out_dtype=torch.bfloat16)


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="one-byte scales"):
        to_blocked(torch.ones(4, 4))
    with pytest.raises(ValueError, match="want 1024 of one byte"):
        from_blocked(torch.zeros(512, dtype=torch.uint8), 129, 4)
