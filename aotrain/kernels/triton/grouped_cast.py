"""grouped_cast_t on a GPU: one kernel that pads, quantizes and transposes groups, and on request their rows as well.

    data_t[k, padded row] = saturate(x[row, k] * inv_scale_t[block of (k, row)])        zeros in padding
    data[row, k]          = saturate(x[row, k] * inv_scale[block of (row, k)])

A tile of rows never reaches across groups (`aotrain.kernels.triton.groups`), and finds its group on the device, so
nothing waits for the offsets. Bytes per element of a 16-bit x, without scales and padding:

| blocks            | transposed | both          | why no fewer                                                   |
|-------------------|------------|---------------|----------------------------------------------------------------|
| 1 x 128           | 2 + 1      | 2 + 1 + 1     | a tile holds whole blocks, so x is read once                   |
| one scale per row | 2 + 2 + 1  | 2 + 2 + 1 + 1 | the scale of a column of a group needs all of the group's      |
|                   |            |               | rows, so a first pass takes the maxima of columns, and of rows |

This file does not do E8M0 scales, other blocks, or one scale per group.
"""

import torch
import triton
import triton.language as tl

from aotrain.formats import BLOCKWISE_1X128, ROWWISE, ElementFormat, ScaleFormat, scale_shape
from aotrain.formats.scaling import Block
from aotrain.kernels.triton._numerics import magnitude_bits, saturating_cast, scales_from_amax_bits
from aotrain.kernels.triton.groups import block_of_groups, group_of_tile, tiles_of_groups
from aotrain.kernels.triton.scaled_cast import kernel_constants
from aotrain.kernels.triton.scaled_cast_amax import AMAX_TILE, long_offsets, tile_offsets
from aotrain.kernels.triton.scaled_cast_tiles import SQUARE_TILE, WIDE_TILE

GROUPED_BLOCKS: tuple[Block, ...] = (ROWWISE, BLOCKWISE_1X128)
# Rows of a program of the maxima: the more, the fewer atomics. Not measured on a GPU yet.
AMAX_ROWS = 128


@triton.jit
def _grouped_amax_kernel(
    x_ptr,  # [M, K], any strides
    ends_ptr,  # [E] int32
    rows_ptr,  # [M] int32, zeros
    columns_ptr,  # [E, K] int32, zeros
    num_groups,
    K,
    stride_m,
    stride_k,
    OF_ROWS: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Bits of the largest magnitudes of each column of each group, and of each row: 2 bytes read per element."""
    column_tiles = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    group, start, local = group_of_tile(ends_ptr, num_groups, program // column_tiles, ROWS, BLOCK_E)
    if group < num_groups:
        end = tl.minimum(tl.load(ends_ptr + group), start + (local + 1) * ROWS)
        first_column = (program % column_tiles).to(tl.int64) * BLOCK_K
        columns = first_column + tl.arange(0, BLOCK_K)
        offsets = tile_offsets(stride_m, stride_k, LONG_OFFSETS, BLOCK_M, BLOCK_K)
        long_stride_m = first_column * 0 + stride_m  # of 64 bits: a Python number has no type to convert
        largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for first in range(start + local * ROWS, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            mask = (rows < end)[:, None] & (columns < K)[None, :]
            x_tile = x_ptr + first * long_stride_m + first_column * stride_k
            bits = magnitude_bits(tl.load(x_tile + offsets, mask=mask, other=0.0).to(tl.float32))
            if OF_ROWS:
                tl.atomic_max(rows_ptr + rows, tl.max(bits, axis=1), mask=rows < end, sem="relaxed")
            largest = tl.maximum(largest, bits)
        if start + local * ROWS < end:
            column_ptrs = columns_ptr + group.to(tl.int64) * K + columns
            tl.atomic_max(column_ptrs, tl.max(largest, axis=0), mask=columns < K, sem="relaxed")


@triton.jit
def _grouped_cast_kernel(
    x_ptr,  # [M, K], any strides
    ends_ptr,  # [E] int32
    padded_ends_ptr,  # [E] int32
    data_ptr,  # [M, K] contiguous, 8-bit; not written without ROWS
    scale_ptr,  # [M, K / columns of the block] float32
    row_amax_ptr,  # [M] int32, for one scale per row
    data_t_ptr,  # [K, M_PAD] contiguous
    scale_t_ptr,  # [E, K] for one scale per row of the transposition, else [K, M_PAD / 128]
    column_amax_ptr,  # [E, K] int32, or [M_PAD / 128, K] to write and read
    num_groups,
    M_PAD,
    K,
    stride_m,
    stride_k,
    ROWS: tl.constexpr,  # elements of a row with one scale: -1 for all, BLOCK_K, or 0 to leave data out
    COLUMNS: tl.constexpr,  # elements of a column with one scale: -1 for all of a group, or BLOCK_M
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    LONG_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Per element of a 16-bit x, 2 bytes read and 1 written per output."""
    ELEMENT: tl.constexpr = data_t_ptr.dtype.element_ty
    column_tiles = tl.cdiv(K, BLOCK_K)
    # Backwards: the last tiles that the maxima were taken of are still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column_tile = (program % column_tiles).to(tl.int64)
    group, padded_start, local = group_of_tile(padded_ends_ptr, num_groups, program // column_tiles, BLOCK_M, BLOCK_E)
    inside = group < num_groups  # else the columns after the last group, which become zeros
    # Groups are padded to multiples of at least 16, which the compiler needs to know for vectors.
    padded_end = tl.multiple_of(tl.load(padded_ends_ptr + group, mask=inside, other=M_PAD), 16)
    first_padded = tl.multiple_of((padded_start + local * BLOCK_M).to(tl.int64), 16)
    if first_padded < padded_end:
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(ends_ptr + group, mask=inside, other=0)
        first_row, first_column = (start + local * BLOCK_M).to(tl.int64), column_tile * BLOCK_K
        rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_K)
        mask = (rows < end)[:, None] & (columns < K)[None, :]
        x_tile = x_ptr + first_row * stride_m + first_column * stride_k
        x_offsets = tile_offsets(stride_m, stride_k, LONG_OFFSETS, BLOCK_M, BLOCK_K)
        x_hp = tl.load(x_tile + x_offsets, mask=mask, other=0.0)

        if COLUMNS == -1:
            column_amax = column_amax_ptr + group.to(tl.int64) * K + columns
            amax_mask = (columns < K) & inside
        else:
            # Maxima of the tile as it was loaded reach the threads that hold the transposition through memory; see
            # `_scaled_cast_tiles_kernel`.
            column_amax = column_amax_ptr + first_padded // BLOCK_M * K + columns
            amax_mask = columns < K
            tl.store(column_amax, tl.max(magnitude_bits(x_hp.to(tl.float32)), axis=0), mask=amax_mask)
        if ROWS != 0:
            x = x_hp.to(tl.float32)
            if ROWS == -1:
                bits = tl.load(row_amax_ptr + rows, mask=rows < end, other=0)
                scale_ptrs, scale_mask = scale_ptr + rows, (rows < end) & (column_tile == 0)
            else:
                bits = tl.max(magnitude_bits(x), axis=1)
                scale_ptrs, scale_mask = scale_ptr + rows * column_tiles + column_tile, rows < end
            scale, inv_scale = scales_from_amax_bits(bits, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)
            tl.store(scale_ptrs, scale, mask=scale_mask)
            data = saturating_cast(x * inv_scale[:, None], ELEMENT, ELEMENT_MAX)
            data_tile = data_ptr + first_row * K + first_column
            tl.store(data_tile + tile_offsets(K, 1, LONG_OFFSETS, BLOCK_M, BLOCK_K), data, mask=mask)
        tl.debug_barrier()
        # Before anything else: the compiler can then exchange 16-bit elements, four 8 x 8 matrices an instruction.
        x = tl.trans(x_hp).to(tl.float32)
        bits = tl.load(column_amax, mask=amax_mask, other=0)
        scale, inv_scale = scales_from_amax_bits(bits, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)
        if COLUMNS == -1:
            tl.store(scale_t_ptr + group.to(tl.int64) * K + columns, scale, mask=amax_mask & (local == 0))
        else:
            scale_ptrs = scale_t_ptr + columns * (M_PAD // BLOCK_M) + first_padded // BLOCK_M
            tl.store(scale_ptrs, scale, mask=amax_mask)
        data = saturating_cast(x * inv_scale[:, None], ELEMENT, ELEMENT_MAX)
        data_t_tile = data_t_ptr + first_column * M_PAD + first_padded
        offsets_t = tile_offsets(M_PAD, 1, LONG_OFFSETS, BLOCK_K, BLOCK_M)
        fits = first_padded + tl.arange(0, BLOCK_M) < padded_end
        tl.store(data_t_tile + offsets_t, data, mask=(columns < K)[:, None] & fits[None, :])


def grouped_cast_both(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    padded_rows: int,
    block: Block | None,
    block_t: Block,
    element: ElementFormat,
    scale_format: ScaleFormat,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the transposition of each group, and its rows.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, not empty, any strides; fast where K is contiguous. CPU tensors work
            under TRITON_INTERPRET=1.
        ends, padded_ends, padded_rows: of a `GroupLayout` whose `align` is a multiple of 16; at least one group.
        block: one of GROUPED_BLOCKS for the rows; None leaves them out.
        block_t: one of GROUPED_BLOCKS for the transposition; for 1 x 128 the groups are aligned to multiples of 128.
        element: FLOAT8_E4M3, FLOAT8_E5M2 or INT8.
        scale_format: `float32` or `float32_pow2`.

    Returns:
        (data, scale, data_t, scale_t) as `aotrain.kernels.grouped_cast` defines them. What was left out has no
        elements, and nothing is written for rows of no group.
    """
    num_columns, num_groups = x_hp.shape[1], ends.shape[0]
    tile = SQUARE_TILE if BLOCKWISE_1X128 in (block, block_t) else WIDE_TILE
    row_tiles = tiles_of_groups(padded_rows, num_groups, tile.block_m)
    shape_t = (num_groups, num_columns) if block_t == ROWWISE else (num_columns, padded_rows // 128)

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x_hp.device)

    data = empty(x_hp.shape if block is not None else (0,), element.dtype)
    scale = empty(scale_shape(x_hp.shape, block) if block is not None else (0,))
    data_t, scale_t = empty((num_columns, padded_rows), element.dtype), empty(shape_t)
    with torch.cuda.device_of(x_hp):
        row_amax, column_amax = _amax(x_hp, ends, block == ROWWISE, block_t == ROWWISE)
        if block_t != ROWWISE:  # room for those that cross within a program
            column_amax = empty(shape_t[::-1], torch.int32)
        _grouped_cast_kernel[(row_tiles * triton.cdiv(num_columns, tile.block_k),)](
            *(x_hp, ends, padded_ends, data, scale, row_amax, data_t, scale_t, column_amax),
            *(num_groups, padded_rows, num_columns, *x_hp.stride()),
            ROWS=0 if block is None else block[1],
            COLUMNS=block_t[1],
            **kernel_constants(element, scale_format),
            LONG_OFFSETS=long_offsets(x_hp[None], tile) or padded_rows * tile.block_k >= 2**31,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            BLOCK_E=block_of_groups(num_groups),
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return data, scale, data_t, scale_t


def _amax(x: torch.Tensor, ends: torch.Tensor, of_rows: bool, of_columns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits of the largest magnitudes of rows [M] and of each group's columns [E, K], where asked for."""
    (num_rows, num_columns), num_groups = x.shape, ends.shape[0]
    sizes = [num_rows if of_rows else 0, num_groups * num_columns]
    if not (of_rows or of_columns):
        return (torch.empty(0, dtype=torch.int32, device=x.device),) * 2
    rows, columns = torch.zeros(sum(sizes), dtype=torch.int32, device=x.device).split(sizes)
    tiles = tiles_of_groups(num_rows, num_groups, AMAX_ROWS) * triton.cdiv(num_columns, AMAX_TILE.block_k)
    _grouped_amax_kernel[(tiles,)](
        *(x, ends, rows, columns, num_groups, num_columns, *x.stride()),
        OF_ROWS=of_rows,
        LONG_OFFSETS=long_offsets(x[None], AMAX_TILE),
        ROWS=AMAX_ROWS,
        BLOCK_M=AMAX_TILE.block_m,
        BLOCK_K=AMAX_TILE.block_k,
        BLOCK_E=block_of_groups(num_groups),
        num_warps=AMAX_TILE.num_warps,
        enable_fp_fusion=False,
    )
    return rows, columns
