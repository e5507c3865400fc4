"""nvfp4_cast on a GPU: one read for the maxima and the noise key, one for each operand.

Bytes per element of a 16-bit x: 2 for the first read; 2 read, 0.5 of codes and 0.06 of scales written per operand. The
global scale is not known before the last element is read, so there is no fewer; of the second read the L2 cache gives
what it still holds.

- `_nvfp4_measure_kernel`: largest magnitudes of x and of the transformed transposition, and the sum of all bits. They
  meet in memory by integer atomics, whose result does not depend on the order.
- `_nvfp4_along_kernel`: blocks along the contiguous dimension, a tile of rows per program.
- `_nvfp4_across_kernel`: blocks across it. A program holds 16 rows as 16 tensors, so that the transform, the maxima and
  the packing of codes are arithmetic within a thread; the 8 bytes of a block are stored as one word, transposed through
  shared memory by the compiler.

The stochastic noise is Philox per eight neighbours, in the same counters as `formats.philox_bits16`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from aotrain.formats.random import seed_word
from aotrain.kernels.triton._numerics import magnitude_bits
from aotrain.kernels.triton._nvfp4_numerics import (
    block_scales,
    global_scale_from_bits,
    hadamard16,
    nearest_code,
    stochastic_code,
)
from aotrain.kernels.triton.adam import _noise_of_eight

# Tiles: rows (along) or groups of 16 rows (across), columns, warps. From compiled register counts; not measured yet.
ALONG_TILE = (32, 128, 4)
ACROSS_TILE = (8, 64, 4)


@triton.jit
def _scale_offsets(rows, blocks, num_blocks, BLOCKED: tl.constexpr):
    """Where the scales of operand rows x blocks lie: row-major, or in tiles of 128 x 4 (formats.scale_layout)."""
    if BLOCKED:
        tile = (rows // 128) * tl.cdiv(num_blocks, 4) + blocks // 4
        offsets = tile * 512 + rows % 32 * 16 + rows % 128 // 32 * 4 + blocks % 4
    else:
        offsets = rows * num_blocks + blocks
    return offsets


@triton.jit
def _load_row(x_ptr, row, columns, M, K, stride_m, stride_k, SIGN: tl.constexpr, negative):
    """float32 values of rows [G, 1] x columns [1, BLOCK_K], zeros outside; times sign number SIGN unless that is -1."""
    x = tl.load(x_ptr + row * stride_m + columns * stride_k, mask=(row < M) & (columns < K), other=0.0).to(tl.float32)
    if SIGN >= 0:
        x *= (1 - 2 * ((negative >> SIGN) & 1)).to(tl.float32)
    return x


@triton.jit
def _load_16_rows(x_ptr, row, columns, M, K, stride_m, stride_k, negative, S: tl.constexpr):
    """Rows row..row + 15 as sixteen tensors; S is 0 if they are multiplied by signs, -16 if not."""
    x0 = _load_row(x_ptr, row, columns, M, K, stride_m, stride_k, S, negative)
    x1 = _load_row(x_ptr, row + 1, columns, M, K, stride_m, stride_k, S + 1, negative)
    x2 = _load_row(x_ptr, row + 2, columns, M, K, stride_m, stride_k, S + 2, negative)
    x3 = _load_row(x_ptr, row + 3, columns, M, K, stride_m, stride_k, S + 3, negative)
    x4 = _load_row(x_ptr, row + 4, columns, M, K, stride_m, stride_k, S + 4, negative)
    x5 = _load_row(x_ptr, row + 5, columns, M, K, stride_m, stride_k, S + 5, negative)
    x6 = _load_row(x_ptr, row + 6, columns, M, K, stride_m, stride_k, S + 6, negative)
    x7 = _load_row(x_ptr, row + 7, columns, M, K, stride_m, stride_k, S + 7, negative)
    x8 = _load_row(x_ptr, row + 8, columns, M, K, stride_m, stride_k, S + 8, negative)
    x9 = _load_row(x_ptr, row + 9, columns, M, K, stride_m, stride_k, S + 9, negative)
    x10 = _load_row(x_ptr, row + 10, columns, M, K, stride_m, stride_k, S + 10, negative)
    x11 = _load_row(x_ptr, row + 11, columns, M, K, stride_m, stride_k, S + 11, negative)
    x12 = _load_row(x_ptr, row + 12, columns, M, K, stride_m, stride_k, S + 12, negative)
    x13 = _load_row(x_ptr, row + 13, columns, M, K, stride_m, stride_k, S + 13, negative)
    x14 = _load_row(x_ptr, row + 14, columns, M, K, stride_m, stride_k, S + 14, negative)
    x15 = _load_row(x_ptr, row + 15, columns, M, K, stride_m, stride_k, S + 15, negative)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """Bits of the largest magnitude, element by element."""
    a = tl.maximum(
        tl.maximum(magnitude_bits(x0), magnitude_bits(x1)), tl.maximum(magnitude_bits(x2), magnitude_bits(x3))
    )
    b = tl.maximum(
        tl.maximum(magnitude_bits(x4), magnitude_bits(x5)), tl.maximum(magnitude_bits(x6), magnitude_bits(x7))
    )
    c = tl.maximum(
        tl.maximum(magnitude_bits(x8), magnitude_bits(x9)), tl.maximum(magnitude_bits(x10), magnitude_bits(x11))
    )
    d = tl.maximum(
        tl.maximum(magnitude_bits(x12), magnitude_bits(x13)), tl.maximum(magnitude_bits(x14), magnitude_bits(x15))
    )
    return tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def _sum_bits(x):
    """Sum of the float32 bit patterns, as signed integers, in 64 bits."""
    return tl.sum(tl.sum(x.to(tl.int32, bitcast=True).to(tl.int64), axis=1), axis=0)


@triton.jit
def _nvfp4_measure_kernel(
    x_ptr,  # [M, K], any strides
    measures_ptr,  # int64 [3], zeros: bits of the largest magnitudes of x and of the transform, sum of bits
    M,
    K,
    stride_m,
    stride_k,
    negative,  # signs of the transform along M
    PLAIN: tl.constexpr,  # whether the largest magnitude of x is asked for
    TRANSFORM: tl.constexpr,
    CHECKSUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One read of x; three atomics of 8 bytes per program."""
    column_tiles = tl.cdiv(K, BLOCK_K)
    # 64-bit: M * K and the strides times them exceed 2^31 in large models.
    first_row = (tl.program_id(0) // column_tiles).to(tl.int64) * (16 * BLOCK_G)
    first_column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_K
    row = (first_row + 16 * tl.arange(0, BLOCK_G))[:, None]
    columns = (first_column + tl.arange(0, BLOCK_K))[None, :]
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
        x_ptr, row, columns, M, K, stride_m, stride_k, 0, -16
    )
    if PLAIN:
        largest = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
        tl.atomic_max(measures_ptr, tl.max(tl.max(largest, axis=1), axis=0).to(tl.int64), sem="relaxed")
    if CHECKSUM:
        total = _sum_bits(x0) + _sum_bits(x1) + _sum_bits(x2) + _sum_bits(x3)
        total += _sum_bits(x4) + _sum_bits(x5) + _sum_bits(x6) + _sum_bits(x7)
        total += _sum_bits(x8) + _sum_bits(x9) + _sum_bits(x10) + _sum_bits(x11)
        total += _sum_bits(x12) + _sum_bits(x13) + _sum_bits(x14) + _sum_bits(x15)
        tl.atomic_add(measures_ptr + 2, total, sem="relaxed")
    if TRANSFORM:
        # The same addresses: the compiler keeps or finds in the L1 cache what was loaded.
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
            x_ptr, row, columns, M, K, stride_m, stride_k, negative, 0
        )
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = hadamard16(
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
        )
        largest = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
        tl.atomic_max(measures_ptr + 1, tl.max(tl.max(largest, axis=1), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _global_scale(measures_ptr, global_ptr, MEASURE: tl.constexpr):
    """The matrix's scale from its largest magnitude; the first program writes it."""
    scale = global_scale_from_bits(tl.load(measures_ptr + MEASURE).to(tl.int32))
    if tl.program_id(0) == 0:
        tl.store(global_ptr, scale)
    return scale


@triton.jit
def _nvfp4_along_kernel(
    x_ptr,  # [R, C], any strides; fast where columns are adjacent
    data_ptr,  # uint8 [R, P / 2]
    scale_ptr,  # uint8 [R, P / 16], or tiles
    global_ptr,  # float32 [1]
    measures_ptr,  # int64 [3]
    R,
    C,
    P,  # C rounded up to a multiple of 32
    stride_r,
    stride_c,
    seed_word,
    SQUARE: tl.constexpr,  # blocks of 16 x 16
    STOCHASTIC: tl.constexpr,
    BLOCKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """2 bytes read and 0.56 written per element of a 16-bit x."""
    BLOCKS: tl.constexpr = BLOCK_C // 16
    global_scale = _global_scale(measures_ptr, global_ptr, 0)
    column_tiles = tl.cdiv(P, BLOCK_C)
    first_row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_R
    first_column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C
    rows, columns = first_row + tl.arange(0, BLOCK_R), first_column + tl.arange(0, BLOCK_C)
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK_R, BLOCKS, 16))
    amax = tl.max(magnitude_bits(x), axis=2)  # [BLOCK_R, BLOCKS]
    if SQUARE:
        squares = tl.max(tl.reshape(amax, (BLOCK_R // 16, 16, BLOCKS)), axis=1, keep_dims=True)
        amax = tl.reshape(tl.broadcast_to(squares, (BLOCK_R // 16, 16, BLOCKS)), (BLOCK_R, BLOCKS))
    level = tl.full(amax.shape, 1.0, tl.float32) * global_scale
    scale, inverse = block_scales(amax, level, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), level))
    y = tl.reshape(x * inverse[:, :, None], (BLOCK_R, BLOCK_C))
    if STOCHASTIC:
        key = tl.load(measures_ptr + 2) ^ seed_word
        codes = stochastic_code(y, _noise_of_eight(key, rows * P + first_column, BLOCK_C))
    else:
        codes = nearest_code(y)
    even, odd = tl.split(tl.reshape(codes, (BLOCK_R, BLOCK_C // 2, 2)))
    pairs = (first_column // 2 + tl.arange(0, BLOCK_C // 2))[None, :]
    half = P // 2
    tl.store(
        data_ptr + rows[:, None] * half + pairs,
        (even | (odd << 4)).to(tl.uint8),
        mask=(rows < R)[:, None] & (pairs < half),
    )
    blocks = (first_column // 16 + tl.arange(0, BLOCKS))[None, :]
    num_blocks = P // 16
    tl.store(
        scale_ptr + _scale_offsets(rows[:, None], blocks, num_blocks, BLOCKED),
        scale.to(tl.uint8),
        mask=(rows < R)[:, None] & (blocks < num_blocks),
    )


@triton.jit
def _pair(even, odd, inverse, word, STOCHASTIC: tl.constexpr):
    """A byte of two codes, in int32."""
    if STOCHASTIC:
        low = stochastic_code(even * inverse, (word & 0xFFFF).to(tl.int32))
        high = stochastic_code(odd * inverse, (word >> 16).to(tl.int32))
    else:
        low, high = nearest_code(even * inverse), nearest_code(odd * inverse)
    return low | (high << 4)


@triton.jit
def _eight_codes(x0, x1, x2, x3, x4, x5, x6, x7, inverse, key, counter, STOCHASTIC: tl.constexpr):
    """Eight codes as 32 bits in int64."""
    if STOCHASTIC:
        w0, w1, w2, w3 = tl.randint4x(key, counter)
        w0, w1 = w0.to(tl.uint32, bitcast=True), w1.to(tl.uint32, bitcast=True)
        w2, w3 = w2.to(tl.uint32, bitcast=True), w3.to(tl.uint32, bitcast=True)
    else:
        w0, w1, w2, w3 = 0, 0, 0, 0
    low = _pair(x0, x1, inverse, w0, STOCHASTIC) | (_pair(x2, x3, inverse, w1, STOCHASTIC) << 8)
    high = _pair(x4, x5, inverse, w2, STOCHASTIC) | (_pair(x6, x7, inverse, w3, STOCHASTIC) << 8)
    return low.to(tl.int64) | (high.to(tl.int64) << 16)


@triton.jit
def _nvfp4_across_kernel(
    x_ptr,  # [C, R], any strides; fast where R is contiguous
    data_ptr,  # int64 [R, P / 16]: 16 codes each
    scale_ptr,  # uint8 [R, P / 16], or tiles
    global_ptr,  # float32 [1]
    measures_ptr,  # int64 [3]
    R,
    C,
    P,  # C rounded up to a multiple of 32
    stride_r,
    stride_c,
    seed_word,
    negative,
    TRANSFORM: tl.constexpr,
    SQUARE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCKED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """2 bytes read and 0.56 written per element of a 16-bit x."""
    global_scale = _global_scale(measures_ptr, global_ptr, 1 if TRANSFORM else 0)
    row_tiles = tl.cdiv(R, BLOCK_R)
    first_group = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_G
    first_row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_R
    groups = (first_group + tl.arange(0, BLOCK_G))[:, None]
    rows = (first_row + tl.arange(0, BLOCK_R))[None, :]
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = _load_16_rows(
        x_ptr, groups * 16, rows, C, R, stride_c, stride_r, negative, 0 if TRANSFORM else -16
    )
    if TRANSFORM:
        x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = hadamard16(
            x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15
        )
    amax = _largest_of_16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    if SQUARE:
        squares = tl.max(tl.reshape(amax, (BLOCK_G, BLOCK_R // 16, 16)), axis=2, keep_dims=True)
        amax = tl.reshape(tl.broadcast_to(squares, (BLOCK_G, BLOCK_R // 16, 16)), (BLOCK_G, BLOCK_R))
    level = tl.full(amax.shape, 1.0, tl.float32) * global_scale
    scale, inverse = block_scales(amax, level, tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), level))
    key = tl.load(measures_ptr + 2) ^ seed_word
    counter = (rows * P + groups * 16) >> 3
    low = _eight_codes(x0, x1, x2, x3, x4, x5, x6, x7, inverse, key, counter, STOCHASTIC)
    high = _eight_codes(x8, x9, x10, x11, x12, x13, x14, x15, inverse, key, counter + 1, STOCHASTIC)
    num_groups = P // 16
    mask = (rows < R) & (groups < num_groups)
    tl.store(data_ptr + rows * num_groups + groups, low | (high << 32), mask=mask)
    tl.store(scale_ptr + _scale_offsets(rows, groups, num_groups, BLOCKED), scale.to(tl.uint8), mask=mask)


def cast_operands(
    x_hp: torch.Tensor,
    block_rows: int,
    as_is: tuple[torch.Tensor, ...] | None,
    transposed: tuple[torch.Tensor, ...] | None,
    signs: Sequence[int],
    seed: int | None,
) -> None:
    """Write the operands of x [M, K], not empty; CPU tensors work under TRITON_INTERPRET=1.

    Args:
        x_hp: float32, bfloat16 or float16, any strides.
        block_rows: 1 or 16.
        as_is: data, scale (of two dimensions, or of one for tiles) and global scale to write; None leaves it out.
        transposed: the same of x.t().
        signs: of the transform of the transposition along its columns; none without one.
        seed: of stochastic rounding; None rounds to nearest.
    """
    negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
    with torch.cuda.device_of(x_hp):
        plain, transform = as_is is not None or not signs, transposed is not None and bool(signs)
        measures = measure(x_hp, negative, plain=plain, transform=transform, checksum=seed is not None)
        for stream, (x, operand) in enumerate(((x_hp, as_is), (x_hp.t(), transposed))):
            if operand is not None:
                word = 0 if seed is None else seed_word(2 * seed + stream)
                stochastic = seed is not None
                _cast_operand(x, block_rows, operand, measures, bool(signs) and stream == 1, negative, word, stochastic)


def measure(x_hp: torch.Tensor, negative: int, *, plain: bool, transform: bool, checksum: bool) -> torch.Tensor:
    """What the noise key and the global scales of a matrix follow from, int64 [3]; zeros where not asked for.

    Args:
        x_hp: [M, K], not empty, any strides.
        negative: bit i is set where sign i of the transform along M is -1.
        plain: whether to find the bits of the largest magnitude of x.
        transform: the same of the transform.
        checksum: the sum of all bits (`formats.data_key`).
    """
    num_rows, num_columns = x_hp.shape
    measures = torch.zeros(3, dtype=torch.int64, device=x_hp.device)
    block_g, block_k, num_warps = ACROSS_TILE
    with torch.cuda.device_of(x_hp):
        _nvfp4_measure_kernel[(triton.cdiv(num_rows, 16 * block_g) * triton.cdiv(num_columns, block_k),)](
            *(x_hp, measures, num_rows, num_columns, *x_hp.stride(), negative),
            PLAIN=plain,
            TRANSFORM=transform,
            CHECKSUM=checksum,
            BLOCK_G=block_g,
            BLOCK_K=block_k,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return measures


def _cast_operand(
    x: torch.Tensor,
    block_rows: int,
    operand: tuple[torch.Tensor, ...],
    measures: torch.Tensor,
    transform: bool,
    negative: int,
    word: int,
    stochastic: bool,
) -> None:
    data, scale, global_scale = operand
    num_rows, num_columns = x.shape
    padded = 2 * data.shape[1]
    sizes = (num_rows, num_columns, padded, *x.stride(), word)
    flags = {"SQUARE": block_rows == 16, "STOCHASTIC": stochastic, "BLOCKED": scale.dim() == 1}
    outputs = (scale.view(torch.uint8), global_scale, measures)
    if transform or x.stride(1) != 1:
        groups, tile, num_warps = ACROSS_TILE
        grid = (triton.cdiv(num_rows, tile) * triton.cdiv(padded, 16 * groups),)
        _nvfp4_across_kernel[grid](
            *(x, data.view(torch.int64), *outputs, *sizes, negative),
            TRANSFORM=transform,
            **flags,
            BLOCK_G=groups,
            BLOCK_R=tile,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
        return
    block_r, block_c, num_warps = ALONG_TILE
    _nvfp4_along_kernel[(triton.cdiv(num_rows, block_r) * triton.cdiv(padded, block_c),)](
        *(x, data, *outputs, *sizes),
        **flags,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
