"""Products of groups of rows on a GPU, from 8-bit codes with a scale per row or per 128 elements.

    rows:        out[row, n]  = sum_k a[row, k] * b[e, n, k]         row is in group e; rows of no group become zeros
    contracted:  out[e, n, k] = sum_m a[n, m] * b[k, m]              m runs over the padded columns of group e

Sums are taken by the tensor cores over 128 elements at a time and added up in float32, with the product of the two
scales where there is one per 128 elements; scales of whole rows multiply the result. int8 is summed exactly in int32.
This is what torch lacks: its grouped float8 product takes row scales only, on Hopper only, and writes bfloat16.

A tile of rows finds its group on the device (`aotrain.kernels.triton.groups`), so nothing waits for the offsets, and a
launch can be captured. This file does not do E8M0 scales.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from aotrain.kernels.triton.groups import block_of_groups, group_of_tile, tiles_of_groups


class MMConfig(NamedTuple):
    """Tile and launch of a product. The contracted dimension goes by 128, the columns of a tile share a scale."""

    block_m: int
    num_warps: int
    num_stages: int


# A large tile, and one for groups of few rows. Chosen from compiled register counts
# (benchmarks/results/aot_kernels.csv); not measured on a GPU yet.
CONFIGS = (MMConfig(128, 8, 3), MMConfig(64, 4, 4))
BLOCK_N = 128
BLOCK_K = 128
# Row tiles that go through the columns together, so that they share what they read of b in the L2 cache.
BAND = 8


@triton.jit
def _tile_of_program(program, num_programs, column_tiles, BAND: tl.constexpr):
    """(row tile, column tile), going through all columns of BAND row tiles before the next ones."""
    row_tiles = num_programs // column_tiles
    first = program // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    inside = program % (BAND * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def _grouped_mm_kernel(
    a_ptr,  # [M, K] contiguous, 8-bit
    a_scale_ptr,  # [M], or [M, K / 128] float32
    b_ptr,  # [E, N, K] contiguous, 8-bit
    b_scale_ptr,  # [E, N], [E, N, K / 128] or [E, N / 128, K / 128] float32
    out_ptr,  # [M, N] contiguous
    ends_ptr,  # [E] int32
    num_groups,
    M,
    N,
    K,
    SCALED_ROWS: tl.constexpr,  # rows of b that share a scale of 128 elements: 1 or 128; 0 for scales of whole rows
    EVEN_K: tl.constexpr,  # whether 128 divides K
    SUM: tl.constexpr,  # int32 for int8, else float32
    IMPRECISE: tl.constexpr,  # float8 products that Hopper may sum in reduced precision; None for all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row_tile, column_tile = _tile_of_program(tl.program_id(0), tl.num_programs(0), tl.cdiv(N, BLOCK_N), BAND)
    group, start, local = group_of_tile(ends_ptr, num_groups, row_tile, BLOCK_M, BLOCK_E)
    end = tl.load(ends_ptr + group, mask=group < num_groups, other=M)
    first_row, first_column = start + local * BLOCK_M, column_tile * BLOCK_N
    if first_row < end:
        rows, columns, ks = (
            first_row + tl.arange(0, BLOCK_M),
            first_column + tl.arange(0, BLOCK_N),
            tl.arange(0, BLOCK_K),
        )
        long_group, scales_per_row = group.to(tl.int64), tl.cdiv(K, BLOCK_K)
        a_tile = a_ptr + first_row.to(tl.int64) * K + (tl.arange(0, BLOCK_M)[:, None] * K + ks[None, :])
        b_tile = b_ptr + (long_group * N + first_column) * K + (ks[:, None] + tl.arange(0, BLOCK_N)[None, :] * K)
        row_mask, column_mask = rows < end, columns < N
        a_scales = a_scale_ptr + rows.to(tl.int64) * scales_per_row
        if SCALED_ROWS == 128:
            b_scales = b_scale_ptr + (long_group * tl.cdiv(N, BLOCK_N) + column_tile) * scales_per_row
        else:
            b_scales = b_scale_ptr + (long_group * N + columns) * scales_per_row
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for k in range(0, tl.where(group < num_groups, K, 0), BLOCK_K):
            a_mask, b_mask = row_mask[:, None], column_mask[None, :]
            if not EVEN_K:
                a_mask, b_mask = a_mask & (ks < K - k)[None, :], b_mask & (ks < K - k)[:, None]
            a = tl.load(a_tile + k, mask=a_mask, other=0.0)
            b = tl.load(b_tile + k, mask=b_mask, other=0.0)
            if SCALED_ROWS == 0:
                total = tl.dot(a, b, total, max_num_imprecise_acc=IMPRECISE, out_dtype=SUM)
            else:
                a_scale = tl.load(a_scales + k // BLOCK_K, mask=row_mask, other=0.0)
                if SCALED_ROWS == 128:
                    total += tl.dot(a, b) * (a_scale * tl.load(b_scales + k // BLOCK_K))[:, None]
                else:
                    b_scale = tl.load(b_scales + k // BLOCK_K, mask=column_mask, other=0.0)
                    total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
        result = total.to(tl.float32)
        if SCALED_ROWS == 0:
            a_scale = tl.load(a_scale_ptr + rows, mask=row_mask, other=0.0)
            b_scale = tl.load(
                b_scale_ptr + long_group * N + columns, mask=column_mask & (group < num_groups), other=0.0
            )
            result = tl.where(group < num_groups, result * a_scale[:, None] * b_scale[None, :], 0.0)
        out_tile = out_ptr + first_row.to(tl.int64) * N + first_column
        offsets = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out_tile + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_mm_contracted_kernel(
    a_ptr,  # [N, M_PAD] contiguous, 8-bit
    a_scale_ptr,  # [E, N], or [N, M_PAD / 128] float32
    b_ptr,  # [K, M_PAD] contiguous, 8-bit
    b_scale_ptr,  # [E, K], or [K, M_PAD / 128] float32
    out_ptr,  # [E, N, K] contiguous
    padded_ends_ptr,  # [E] int32
    M_PAD,
    N,
    K,
    SCALED_ROWS: tl.constexpr,  # 1 for scales of 128 elements, which divide all groups; 0 for one per row and group
    SUM: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // tiles
    row_tile, column_tile = _tile_of_program(tl.program_id(0) % tiles, tiles, tl.cdiv(K, BLOCK_N), BAND)
    # Groups are padded to multiples of at least 16, which the compiler needs to know for vectors.
    start = tl.multiple_of(tl.load(padded_ends_ptr + group - 1, mask=group > 0, other=0), 16)
    end = tl.multiple_of(tl.load(padded_ends_ptr + group), 16)
    first_row, first_column = row_tile * BLOCK_M, column_tile * BLOCK_N
    rows, columns, ks = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask, column_mask, scales_per_row = rows < N, columns < K, M_PAD // BLOCK_K
    a_rows = a_ptr + rows.to(tl.int64)[:, None] * M_PAD + ks[None, :]
    b_rows = b_ptr + columns.to(tl.int64)[None, :] * M_PAD + ks[:, None]
    a_scales = a_scale_ptr + rows.to(tl.int64) * scales_per_row
    b_scales = b_scale_ptr + columns.to(tl.int64) * scales_per_row
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for m in range(start, end, BLOCK_K):
        m = tl.multiple_of(m, 16)
        a_mask, b_mask = row_mask[:, None], column_mask[None, :]
        if SCALED_ROWS == 0:
            a_mask, b_mask = a_mask & (m + ks < end)[None, :], b_mask & (m + ks < end)[:, None]
        a = tl.load(a_rows + m, mask=a_mask, other=0.0)
        b = tl.load(b_rows + m, mask=b_mask, other=0.0)
        if SCALED_ROWS == 0:
            total = tl.dot(a, b, total, max_num_imprecise_acc=IMPRECISE, out_dtype=SUM)
        else:
            a_scale = tl.load(a_scales + m // BLOCK_K, mask=row_mask, other=0.0)
            b_scale = tl.load(b_scales + m // BLOCK_K, mask=column_mask, other=0.0)
            total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    result, long_group = total.to(tl.float32), group.to(tl.int64)
    if SCALED_ROWS == 0:
        a_scale = tl.load(a_scale_ptr + long_group * N + rows, mask=row_mask, other=0.0)
        b_scale = tl.load(b_scale_ptr + long_group * K + columns, mask=column_mask, other=0.0)
        result = result * a_scale[:, None] * b_scale[None, :]
    out_tile = out_ptr + long_group * N * K + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(out_tile, result.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def grouped_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    scaled_rows: int,
    ends: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    """`out[M, N]`, each row of a [M, K] times the matrix of its group in b [E, N, K]; neither empty.

    Args:
        a, b: contiguous e4m3, e5m2 or int8 codes. CPU tensors work under TRITON_INTERPRET=1.
        a_scale: float32 [M, 1], or [M, ceil(K / 128)], contiguous.
        b_scale: float32 [E, N, 1], [E, N, ceil(K / 128)] or [E, ceil(N / 128), ceil(K / 128)], contiguous.
        scaled_rows: 0, 1 or 128, which of these three b_scale is.
        ends: int32 [E], end offsets in order.
        out_dtype: float32, bfloat16 or float16.
        fast_accum: sum float8 products of whole rows in reduced precision.
    """
    (rows, contracted), (num_groups, columns) = a.shape, b.shape[:2]
    out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    config = select_config(rows // max(1, num_groups), scaled_rows)
    programs = tiles_of_groups(rows, num_groups, config.block_m) * triton.cdiv(columns, BLOCK_N)
    with torch.cuda.device_of(a):
        _grouped_mm_kernel[(programs,)](
            *(a, a_scale, b, b_scale, out, ends, num_groups, rows, columns, contracted),
            SCALED_ROWS=scaled_rows,
            EVEN_K=contracted % BLOCK_K == 0,
            BLOCK_E=block_of_groups(num_groups),
            **kernel_constants(config, a.dtype, fast_accum),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def grouped_mm_contracted(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    scaled_rows: int,
    padded_ends: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    """`out[E, N, K]`, for each group a [N, its columns] times b [K, its columns] transposed; neither empty.

    Args:
        a, b: contiguous codes with columns of groups, as `grouped_cast_t` gives them.
        a_scale, b_scale: float32 [E, N] and [E, K], or [N, columns / 128] and [K, columns / 128], contiguous.
        scaled_rows: 0 or 1, which of these two.
        padded_ends: int32 [E] end offsets in order, multiples of 16, and of 128 for the second kind of scales.
        out_dtype, fast_accum: as for `grouped_mm`.
    """
    (rows, padded), columns, num_groups = a.shape, b.shape[0], padded_ends.shape[0]
    out = torch.empty((num_groups, rows, columns), dtype=out_dtype, device=a.device)
    config = select_config(rows, scaled_rows)
    programs = num_groups * triton.cdiv(rows, config.block_m) * triton.cdiv(columns, BLOCK_N)
    with torch.cuda.device_of(a):
        _grouped_mm_contracted_kernel[(programs,)](
            *(a, a_scale, b, b_scale, out, padded_ends, padded, rows, columns),
            SCALED_ROWS=scaled_rows,
            **kernel_constants(config, a.dtype, fast_accum),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def select_config(rows: int, scaled_rows: int) -> MMConfig:
    """The configuration for groups of so many rows on average; `scaled_rows` as the kernels take it."""
    large, small = CONFIGS
    # With a vector of scales for the rows and one for the columns, the large tile spills registers on Hopper.
    return large if rows > small.block_m and scaled_rows != 1 else small


def kernel_constants(config: MMConfig, dtype: torch.dtype, fast_accum: bool) -> dict[str, Any]:
    """Compile-time constants that both kernels take."""
    integers = dtype == torch.int8
    sums = {"SUM": tl.int32 if integers else tl.float32}
    sums |= {"IMPRECISE": 0 if integers else None if fast_accum else BLOCK_K}
    return sums | {"BLOCK_M": config.block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "BAND": BAND}
