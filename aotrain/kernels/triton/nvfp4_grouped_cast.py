"""nvfp4_grouped_cast on a GPU: the kernels of nvfp4_cast for rows that are sorted by group.

A group takes a multiple of 32 rows where it is padded, so 16 rows that share scales belong to one group, or to none. A
table tells which: the offsets stay on the device. What is one number per matrix in `nvfp4_cast`, the global scale and
the key of the noise, is loaded per row (rows as they are) or per 16 rows (the transposition).

Bytes per element of a 16-bit x as there, but for groups that are small against 32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from aotrain.formats.nvfp4 import nvfp4_global_scale
from aotrain.formats.random import seed_word
from aotrain.kernels.groups import row_groups
from aotrain.kernels.triton._numerics import magnitude_bits
from aotrain.kernels.triton._nvfp4_numerics import block_scales, hadamard16, nearest_code, stochastic_code
from aotrain.kernels.triton.adam import _noise_of_eight
from aotrain.kernels.triton.nvfp4_cast import (
    ACROSS_TILE,
    ALONG_TILE,
    _eight_codes,
    _largest_of_16,
    _load_16_rows,
)


@triton.jit
def _place(block_group_ptr, bounds_ptr, padded_bounds_ptr, blocks, num_blocks):
    """Of blocks of 16 padded rows: group, its first row and the one after its last, its first padded row and size."""
    inside = blocks < num_blocks
    group = tl.load(block_group_ptr + blocks, mask=inside, other=0)
    start = tl.load(bounds_ptr + group)
    end = tl.where(inside, tl.load(bounds_ptr + group + 1), 0)
    first = tl.load(padded_bounds_ptr + group)
    return group, start, end, first, tl.load(padded_bounds_ptr + group + 1) - first


@triton.jit
def _sum_bits_of_blocks(x):
    """Sum of the float32 bit patterns of each row of x, as signed integers, in 64 bits."""
    return tl.sum(x.to(tl.int32, bitcast=True).to(tl.int64), axis=1)


@triton.jit
def _nvfp4_grouped_measure_kernel(
    x_ptr,  # [M, K], any strides
    measures_ptr,  # int64 [E + 1, 3], zeros: bits of the largest magnitudes as they are and transformed, sum of bits
    block_group_ptr,  # int64 [num_blocks]
    bounds_ptr,  # int64 [E + 2]: where groups begin; then twice where the last one ends
    padded_bounds_ptr,  # int64 [E + 2]
    num_blocks,
    K,
    stride_m,
    stride_k,
    negative,  # signs of the transform along M
    PLAIN: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CHECKSUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One read of x; 24 bytes of atomics per 16 rows."""
    column_tiles = tl.cdiv(K, BLOCK_K)
    blocks = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    first_column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_K
    columns = (first_column + tl.arange(0, BLOCK_K))[None, :]
    group, start, end, first, _ = _place(block_group_ptr, bounds_ptr, padded_bounds_ptr, blocks, num_blocks)
    row, end = (start + blocks * 16 - first)[:, None], end[:, None]
    measures = measures_ptr + 3 * group
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
        x_ptr, row, columns, end, K, stride_m, stride_k, 0, -16
    )
    if PLAIN:
        largest = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
        tl.atomic_max(measures, tl.max(largest, axis=1).to(tl.int64), sem="relaxed")
    if CHECKSUM:
        total = _sum_bits_of_blocks(x0) + _sum_bits_of_blocks(x1) + _sum_bits_of_blocks(x2) + _sum_bits_of_blocks(x3)
        total += _sum_bits_of_blocks(x4) + _sum_bits_of_blocks(x5) + _sum_bits_of_blocks(x6) + _sum_bits_of_blocks(x7)
        total += _sum_bits_of_blocks(x8) + _sum_bits_of_blocks(x9) + _sum_bits_of_blocks(x10)
        total += _sum_bits_of_blocks(x11) + _sum_bits_of_blocks(x12) + _sum_bits_of_blocks(x13)
        total += _sum_bits_of_blocks(x14) + _sum_bits_of_blocks(x15)
        tl.atomic_add(measures + 2, total, sem="relaxed")
    if TRANSFORM:
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
            x_ptr, row, columns, end, K, stride_m, stride_k, negative, 0
        )
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = hadamard16(
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
        )
        largest = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
        tl.atomic_max(measures + 1, tl.max(largest, axis=1).to(tl.int64), sem="relaxed")


@triton.jit
def _nvfp4_grouped_along_kernel(
    x_ptr,  # [M, K], any strides; fast where columns are adjacent
    data_ptr,  # uint8 [M, P / 2]
    scale_ptr,  # uint8 [M, P / 16]
    level_ptr,  # float32 [E + 1]: global scales
    measures_ptr,  # int64 [E + 1, 3]
    row_group_ptr,  # int64 [M]
    bounds_ptr,  # int64 [E + 2]
    num_groups,
    M,
    K,
    P,  # K rounded up to a multiple of 32
    stride_m,
    stride_k,
    seed_word,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """2 bytes read and 0.56 written per element of a 16-bit x."""
    BLOCKS: tl.constexpr = BLOCK_C // 16
    column_tiles = tl.cdiv(P, BLOCK_C)
    rows = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    group = tl.load(row_group_ptr + rows, mask=rows < M, other=num_groups)
    mask = (group < num_groups)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_m + columns[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK_R, BLOCKS, 16))
    amax = tl.max(magnitude_bits(x), axis=2)  # [BLOCK_R, BLOCKS]
    level = tl.full(amax.shape, 1.0, tl.float32) * tl.load(level_ptr + group)[:, None]
    scale, inverse = block_scales(amax, level, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), level))
    y = tl.reshape(x * inverse[:, :, None], (BLOCK_R, BLOCK_C))
    if STOCHASTIC:
        key = tl.load(measures_ptr + 3 * group + 2) ^ seed_word
        row = rows - tl.load(bounds_ptr + group)
        codes = stochastic_code(y, _noise_of_eight(key[:, None], row * P + first_column, BLOCK_C))
    else:
        codes = nearest_code(y)
    even, odd = tl.split(tl.reshape(codes, (BLOCK_R, BLOCK_C // 2, 2)))
    pairs = (first_column // 2 + tl.arange(0, BLOCK_C // 2))[None, :]
    blocks = (first_column // 16 + tl.arange(0, BLOCKS))[None, :]
    tl.store(
        data_ptr + rows[:, None] * (P // 2) + pairs,
        (even | (odd << 4)).to(tl.uint8),
        mask=(rows < M)[:, None] & (pairs < P // 2),
    )
    tl.store(
        scale_ptr + rows[:, None] * (P // 16) + blocks,
        scale.to(tl.uint8),
        mask=(rows < M)[:, None] & (blocks < P // 16),
    )


@triton.jit
def _nvfp4_grouped_across_kernel(
    x_ptr,  # [M, K], any strides; fast where columns are adjacent
    data_ptr,  # int64 [K, num_blocks]: 16 codes each
    scale_ptr,  # uint8 [K, num_blocks]
    level_ptr,  # float32 [E + 1]: global scales
    measures_ptr,  # int64 [E + 1, 3]
    block_group_ptr,  # int64 [num_blocks]
    bounds_ptr,  # int64 [E + 2]
    padded_bounds_ptr,  # int64 [E + 2]
    num_blocks,
    K,
    stride_m,
    stride_k,
    seed_word,
    negative,
    TRANSFORM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """2 bytes read and 0.56 written per element of a 16-bit x."""
    row_tiles = tl.cdiv(K, BLOCK_R)
    blocks = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows = ((tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[None, :]
    group, start, end, first, size = _place(block_group_ptr, bounds_ptr, padded_bounds_ptr, blocks, num_blocks)
    at, end = (blocks * 16 - first)[:, None], end[:, None]
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
        x_ptr, start[:, None] + at, rows, end, K, stride_m, stride_k, negative, 0 if TRANSFORM else -16
    )
    if TRANSFORM:
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = hadamard16(
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
        )
    amax = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    level = tl.full(amax.shape, 1.0, tl.float32) * tl.load(level_ptr + group)[:, None]
    scale, inverse = block_scales(amax, level, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), level))
    key = (tl.load(measures_ptr + 3 * group + 2) ^ seed_word)[:, None]
    counter = (rows * size[:, None] + at) >> 3
    low = _eight_codes(x0, x1, x2, x3, x4, x5, x6, x7, inverse, key, counter, STOCHASTIC)
    high = _eight_codes(x8, x9, x10, x11, x12, x13, x14, x15, inverse, key, counter + 1, STOCHASTIC)
    # Zeros of no group may come out of the transform with a sign.
    codes = tl.where(end > start[:, None], low | (high << 32), 0)
    mask = (rows < K) & (blocks < num_blocks)[:, None]
    tl.store(data_ptr + rows * num_blocks + blocks[:, None], codes, mask=mask)
    tl.store(scale_ptr + rows * num_blocks + blocks[:, None], scale.to(tl.uint8), mask=mask)


def cast_groups(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    as_is: tuple[torch.Tensor, ...] | None,
    transposed: tuple[torch.Tensor, ...] | None,
    signs: Sequence[int],
    seed: int | None,
) -> None:
    """Write the operands of x [M, K], not empty; CPU tensors work under TRITON_INTERPRET=1.

    Args:
        x_hp: float32, bfloat16 or float16, any strides.
        ends: of at least one group.
        padded_ends: likewise, in multiples of 32.
        as_is: data, scale and global scales to write; None leaves it out.
        transposed: the same of the groups' transpositions.
        signs: of the transform of the transpositions along their columns; none without one.
        seed: of stochastic rounding; None rounds to nearest.
    """
    (num_rows, num_columns), num_groups, device = x_hp.shape, ends.shape[0], x_hp.device
    negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
    flags = {"num_warps": ACROSS_TILE[2], "enable_fp_fusion": False}
    # Blocks that hold all rows, whether or not the transposition is wanted.
    num_blocks = (num_rows // 32 * 32 + 32 * num_groups) // 16
    first_rows = torch.arange(0, 16 * num_blocks, 16, dtype=padded_ends.dtype, device=device)
    block_group = torch.searchsorted(padded_ends, first_rows, right=True)
    bounds, padded = (torch.cat([e.new_zeros(1), e, e[-1:]]).long() for e in (ends, padded_ends))
    with torch.cuda.device_of(x_hp):
        measures = torch.zeros((num_groups + 1, 3), dtype=torch.int64, device=device)
        tables = (block_group, bounds, padded, num_blocks, num_columns, *x_hp.stride())
        block_g, tile, _ = ACROSS_TILE
        grid = (triton.cdiv(num_blocks, block_g) * triton.cdiv(num_columns, tile),)
        _nvfp4_grouped_measure_kernel[grid](
            *(x_hp, measures, *tables, negative),
            PLAIN=as_is is not None or not signs,
            TRANSFORM=transposed is not None and bool(signs),
            CHECKSUM=seed is not None,
            BLOCK_G=block_g,
            BLOCK_K=tile,
            **flags,
        )
        levels = nvfp4_global_scale(measures[:, :2].t().to(torch.int32).contiguous().view(torch.float32))
        words = (0, 0) if seed is None else (seed_word(2 * seed), seed_word(2 * seed + 1))
        if as_is is not None:
            _cast_rows(x_hp, row_groups(ends, num_rows), bounds, measures, levels[0], as_is, words[0], seed is not None)
        if transposed is not None:
            data, scale, global_scale = transposed
            level = levels[int(bool(signs))]
            global_scale.copy_(level[:-1])
            _nvfp4_grouped_across_kernel[grid](
                *(x_hp, data.view(torch.int64), scale.view(torch.uint8), level, measures, *tables, words[1], negative),
                TRANSFORM=bool(signs),
                STOCHASTIC=seed is not None,
                BLOCK_G=block_g,
                BLOCK_R=tile,
                **flags,
            )


def _cast_rows(
    x: torch.Tensor,
    row_group: torch.Tensor,
    bounds: torch.Tensor,
    measures: torch.Tensor,
    level: torch.Tensor,
    operand: tuple[torch.Tensor, ...],
    word: int,
    stochastic: bool,
) -> None:
    data, scale, global_scale = operand
    global_scale.copy_(level[:-1])
    padded = 2 * data.shape[1]
    block_r, block_c, num_warps = ALONG_TILE
    grid = (triton.cdiv(x.shape[0], block_r) * triton.cdiv(padded, block_c),)
    _nvfp4_grouped_along_kernel[grid](
        *(x, data, scale.view(torch.uint8), level, measures, row_group, bounds),
        *(level.shape[0] - 1, *x.shape, padded, *x.stride(), word),
        STOCHASTIC=stochastic,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
