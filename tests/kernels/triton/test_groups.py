"""Tiles of groups: every row, those of no group included, is in one tile, of its own group."""

import pytest
import torch
import triton
import triton.language as tl

from aotrain.kernels.groups import group_bounds
from aotrain.kernels.triton.groups import block_of_groups, group_of_tile, tiles_of_groups


@triton.jit
def _tiles_kernel(ends_ptr, out_ptr, num_groups, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    tile = tl.program_id(0)
    group, start, local = group_of_tile(ends_ptr, num_groups, tile, BLOCK, BLOCK_E)
    tl.store(out_ptr + 3 * tile, group)
    tl.store(out_ptr + 3 * tile + 1, start)
    tl.store(out_ptr + 3 * tile + 2, local)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    ("sizes", "rows"), [([32, 64], 96), ([5, 0, 37, 1], 43), ([0, 0], 9), ([17, 3, 20], 150), ([1] * 20, 20), ([], 33)]
)
def test_tiles_cover_each_row_once(sizes: list[int], rows: int, block: int) -> None:
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = [*group_bounds(ends, rows), (sum(sizes), rows)]
    out = torch.full((tiles_of_groups(rows, len(sizes), block), 3), -1, dtype=torch.int32)
    _tiles_kernel[(out.shape[0],)](ends, out, len(sizes), BLOCK=block, BLOCK_E=block_of_groups(len(sizes)))
    owners = [0] * rows
    for group, start, local in out.tolist():
        assert start == bounds[group][0]
        assert local >= 0
        for row in range(start + local * block, min(bounds[group][1], start + (local + 1) * block)):
            owners[row] += 1
    assert owners == [1] * rows
