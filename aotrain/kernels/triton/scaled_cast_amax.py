"""The largest magnitudes of whole matrices, rows and columns: the first of the two reads of `scaled_cast_tiles`.

    tensor[b]     = max_mk |x[b, m, k]|
    rows[b, m]    = max_k  |x[b, m, k]|
    columns[b, k] = max_m  |x[b, m, k]|

All that are asked for come from one read of x. Maxima of programs meet in memory by atomic integer maxima, which give
the same result in any order. Here too is what both reads share: the offsets of a tile.
"""

import torch
import triton
import triton.language as tl

from aotrain.formats import COLWISE, ROWWISE, TENSORWISE
from aotrain.formats.scaling import Block
from aotrain.kernels.triton._numerics import magnitude_bits
from aotrain.kernels.triton.scaled_cast import Config

# A program of the maximum goes down its columns tile by tile: the more, the fewer atomics, up to MAX_STEPS and as long
# as that leaves ENOUGH_PROGRAMS to fill a GPU. Not measured yet.
AMAX_TILE = Config(32, 128, 4)
MAX_STEPS = 16
ENOUGH_PROGRAMS = 1024


@triton.jit
def tile_offsets(stride_m, stride_k, LONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets of a tile's elements from its first one, in 32 bits unless LONG: half the registers of pointers."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    if LONG:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    return rows[:, None] * stride_m + columns[None, :] * stride_k


@triton.jit
def _amax_kernel(
    x_ptr,  # [batch, M, K], any strides
    tensor_ptr,  # [batch] int32, zeros
    rows_ptr,  # [batch, M] int32, zeros
    columns_ptr,  # [batch, K] int32, zeros
    M,
    K,
    stride_b,
    stride_m,
    stride_k,
    rows_per_program,
    OF_TENSOR: tl.constexpr,
    OF_ROWS: tl.constexpr,
    OF_COLUMNS: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Bits of the largest magnitudes of the whole matrix, of each row and of each column, as asked for.

    2 bytes read per element of a 16-bit x, once for all three; besides, atomic maxima of 4 bytes per row and 128
    columns, and per column and strip.
    """
    strips, column_tiles = tl.cdiv(M, rows_per_program), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    # 64-bit from here on: M * K and the strides times them exceed 2^31 in large models.
    batch = (program // (column_tiles * strips)).to(tl.int64)
    first_row = program // column_tiles % strips * rows_per_program
    first_column = (program % column_tiles).to(tl.int64) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    offsets = tile_offsets(stride_m, stride_k, LONG_OFFSETS, BLOCK_M, BLOCK_K)
    x_strip = x_ptr + batch * stride_b + first_row.to(tl.int64) * stride_m + first_column * stride_k
    long_stride_m = first_column * 0 + stride_m  # of 64 bits: a Python number has no type to convert
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for start in range(first_row, tl.minimum(first_row + rows_per_program, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_strip + (start - first_row) * long_stride_m + offsets, mask=mask, other=0.0).to(tl.float32)
        bits = magnitude_bits(x)
        if OF_ROWS:
            tl.atomic_max(rows_ptr + batch * M + rows, tl.max(bits, axis=1), mask=rows < M, sem="relaxed")
        if OF_TENSOR or OF_COLUMNS:
            largest = tl.maximum(largest, bits)
    if OF_COLUMNS:
        tl.atomic_max(columns_ptr + batch * K + columns, tl.max(largest, axis=0), mask=columns < K, sem="relaxed")
    if OF_TENSOR:
        tl.atomic_max(tensor_ptr + batch, tl.max(tl.max(largest, axis=1), axis=0), sem="relaxed")


def matrix_maxima(x: torch.Tensor, blocks: set[Block]) -> dict[Block, torch.Tensor]:
    """Bits of the largest magnitudes of whole matrices, rows or columns, by block; one read of x for all of them."""
    if not blocks:
        return {}
    batch, num_rows, num_columns = x.shape
    counts = {TENSORWISE: batch, ROWWISE: batch * num_rows, COLWISE: batch * num_columns}
    sizes = [count if block in blocks else 0 for block, count in counts.items()]
    maxima = torch.zeros(sum(sizes), dtype=torch.int32, device=x.device).split(sizes)
    column_tiles = triton.cdiv(num_columns, AMAX_TILE.block_k)
    tiles = batch * column_tiles * triton.cdiv(num_rows, AMAX_TILE.block_m)
    rows_per_program = AMAX_TILE.block_m * max(1, min(MAX_STEPS, tiles // ENOUGH_PROGRAMS))
    _amax_kernel[(batch * column_tiles * triton.cdiv(num_rows, rows_per_program),)](
        x,
        *maxima,
        *(num_rows, num_columns, *x.stride(), rows_per_program),
        *(block in blocks for block in counts),
        LONG_OFFSETS=long_offsets(x, AMAX_TILE),
        BLOCK_M=AMAX_TILE.block_m,
        BLOCK_K=AMAX_TILE.block_k,
        num_warps=AMAX_TILE.num_warps,
        enable_fp_fusion=False,
    )
    return dict(zip(counts, maxima, strict=True))


def long_offsets(x: torch.Tensor, tile: Config) -> bool:
    """Whether elements of a tile of x, or of its contiguous copies, are 2^31 or more elements apart.

    Copies may be padded to multiples of up to 128.
    """
    steps = (*x.stride()[1:], *(size + 127 for size in x.shape[1:]))
    return max(steps) * (tile.block_m + tile.block_k) >= 2**31
