"""mx_cast to e2m1 behind the random Hadamard transform, on a GPU: blocks of 32 across the contiguous dimension.

The transform is that of a gradient's or an input's transposition, whose blocks lie across the rows of memory. So a
program holds 32 rows as 32 tensors, as the kernels of NVFP4 do with 16 (`nvfp4_cast`): transform, maxima and packing
are arithmetic within a thread, and the codes of a block are stored as words, transposed through shared memory by the
compiler. A block of the transform is the block of a scale.

Bytes per element of a 16-bit x: 2 read; 1 of codes (packed: 1/2) and 1/32 of scales written. Stochastic rounding needs
the sum of all bits first (`nvfp4_cast.measure`), 2 bytes more that casts of the same matrix share.
"""

import functools

import torch
import triton
import triton.language as tl

from aotrain.formats import ScaleFormat, blocked_size
from aotrain.formats.element import FLOAT4_E2M1
from aotrain.formats.hadamard import hadamard_signs
from aotrain.formats.mx import SIGNS_SEED
from aotrain.formats.random import seed_word
from aotrain.kernels.triton._numerics import e8m0_from_amax_bits, e8m0_inverse
from aotrain.kernels.triton._nvfp4_numerics import hadamard32
from aotrain.kernels.triton.mx_cast import kernel_constants
from aotrain.kernels.triton.nvfp4_cast import _eight_codes, _largest_of_16, _load_16_rows, _scale_offsets

HADAMARD = 32
# Groups of 32 rows, columns, warps. From compiled register counts; not measured yet.
TILE = (4, 64, 4)


@triton.jit
def _codes_to_bytes(word):
    """Eight codes in the low half of int64 to eight bytes."""
    word = (word | (word << 16)) & 0x0000FFFF0000FFFF
    word = (word | (word << 8)) & 0x00FF00FF00FF00FF
    return (word | (word << 4)) & 0x0F0F0F0F0F0F0F0F


@triton.jit
def _sixteen_codes(x, inverse, key, counter, STOCHASTIC: tl.constexpr):
    """Two words of eight codes each, in int64."""
    low = _eight_codes(*(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]), *(inverse, key, counter, STOCHASTIC))
    high = _eight_codes(
        *(x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]), *(inverse, key, counter + 1, STOCHASTIC)
    )
    return low, high


@triton.jit
def _mx_transform_cast_kernel(
    x_ptr,  # [batch, C, R], any strides; fast where R is contiguous
    data_ptr,  # int64 [batch, R, P / 8], eight codes each, or [batch, R, P / 16] packed; P: C in whole blocks of 32
    scale_ptr,  # uint8 [batch, R, P / 32], or [batch, scale_size] in tiles
    measures_ptr,  # int64 [3]: the last is the sum of bits
    R,
    C,
    stride_b,
    stride_c,
    stride_r,
    scale_size,
    seed_word,
    negative_low,  # bit i is set where sign i is -1
    negative_high,  # where sign 16 + i is
    STOCHASTIC: tl.constexpr,
    ROUNDING: tl.constexpr,
    ELEMENT_MAX_INVERSE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    WORDS: tl.constexpr,  # of a block's codes: 4, or 2 packed
    BLOCKED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """2 bytes read and 1.03 written per element of a 16-bit x; packed 0.53."""
    num_groups = tl.cdiv(C, 32)
    row_tiles, group_tiles = tl.cdiv(R, BLOCK_R), tl.cdiv(num_groups, BLOCK_G)
    program = tl.program_id(0)
    # 64-bit from here on: the size of x and the strides exceed 2^31 in large models.
    batch = (program // (row_tiles * group_tiles)).to(tl.int64)
    first_group = (program // row_tiles % group_tiles).to(tl.int64) * BLOCK_G
    first_row = (program % row_tiles).to(tl.int64) * BLOCK_R
    groups = (first_group + tl.arange(0, BLOCK_G))[:, None]
    rows = (first_row + tl.arange(0, BLOCK_R))[None, :]
    x_ptr += batch * stride_b
    low = _load_16_rows(x_ptr, groups * 32, rows, C, R, stride_c, stride_r, negative_low, 0)
    high = _load_16_rows(x_ptr, groups * 32 + 16, rows, C, R, stride_c, stride_r, negative_high, 0)
    low, high = hadamard32(low, high)
    amax = tl.maximum(_largest_of_16(*low), _largest_of_16(*high))
    byte = e8m0_from_amax_bits(amax, ROUNDING, ELEMENT_MAX_INVERSE, MAX_EXPONENT, MANTISSA_BITS)
    inverse = e8m0_inverse(byte)
    place = (batch * R + rows) * num_groups + groups
    key = (tl.load(measures_ptr + 2) ^ seed_word) if STOCHASTIC else 0
    w0, w1 = _sixteen_codes(low, inverse, key, place * 4, STOCHASTIC)
    w2, w3 = _sixteen_codes(high, inverse, key, place * 4 + 2, STOCHASTIC)
    mask = (rows < R) & (groups < num_groups)
    if WORDS == 2:
        words = tl.join(w0 | (w1 << 32), w2 | (w3 << 32))
    else:
        w0, w1, w2, w3 = _codes_to_bytes(w0), _codes_to_bytes(w1), _codes_to_bytes(w2), _codes_to_bytes(w3)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_G, BLOCK_R, 4))
    number = tl.arange(0, WORDS)[None, None, :]
    tl.store(data_ptr + (place * WORDS)[:, :, None] + number, words, mask=mask[:, :, None])
    if BLOCKED:
        scale_place = batch * scale_size + _scale_offsets(rows, groups, num_groups, BLOCKED)
    else:
        scale_place = place
    tl.store(scale_ptr + scale_place, byte.to(tl.uint8), mask=mask)


def kernel_flags(scale_format: ScaleFormat, *, stochastic: bool, packed: bool, blocked: bool) -> dict[str, object]:
    """Compile-time constants of the kernel, but for its tile."""
    constants = kernel_constants(FLOAT4_E2M1, scale_format, blocked=blocked)
    names = ("ROUNDING", "ELEMENT_MAX_INVERSE", "MAX_EXPONENT", "MANTISSA_BITS", "BLOCKED")
    return {name: constants[name] for name in names} | {"STOCHASTIC": stochastic, "WORDS": 2 if packed else 4}


@functools.lru_cache(maxsize=1)
def _negative_signs() -> tuple[int, int]:
    """The signs of every transform as bits, set where -1: the first sixteen, the others."""
    bits = [int(sign < 0) << i % 16 for i, sign in enumerate(hadamard_signs(SIGNS_SEED, HADAMARD).tolist())]
    return sum(bits[:16]), sum(bits[16:])


def mx_transform_cast(
    x_hp: torch.Tensor,
    scale_format: ScaleFormat,
    measures: torch.Tensor | None,
    *,
    packed: bool = False,
    blocked: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the transposition of matrices to e2m1 in blocks of 1 x 32, transformed along its columns.

    Args:
        x_hp: [batch, C, R] float32, bfloat16 or float16, not empty, any strides; fast where R is contiguous. CPU
            tensors work under TRITON_INTERPRET=1.
        scale_format: one of the E8M0 formats.
        measures: int64 [3] from `nvfp4_cast.measure` of x, for stochastic rounding; None rounds to nearest.
        packed, blocked: as for `mx_cast_tiles`.

    Returns:
        (data uint8 [batch, R, P], scale float8_e8m0fnu [batch, R, P / 32]), contiguous, P = ceil(C / 32) * 32: of
        `quantize_mx(x_hp.mT)` bit for bit. Packed, data is [batch, R, P / 2]; blocked, scale [batch, blocked_size].
    """
    batch, columns, rows = x_hp.shape
    num_groups = -(-columns // HADAMARD)
    words = torch.empty((batch, rows, num_groups * (2 if packed else 4)), dtype=torch.int64, device=x_hp.device)
    if blocked:  # the padding is not written
        scale = torch.zeros((batch, blocked_size(rows, num_groups)), dtype=torch.uint8, device=x_hp.device)
    else:
        scale = torch.empty((batch, rows, num_groups), dtype=torch.uint8, device=x_hp.device)
    negative_low, negative_high = _negative_signs()
    block_g, block_r, num_warps = TILE
    with torch.cuda.device_of(x_hp):
        _mx_transform_cast_kernel[(batch * triton.cdiv(rows, block_r) * triton.cdiv(num_groups, block_g),)](
            *(x_hp, words, scale, measures, rows, columns, *x_hp.stride(), scale.numel() // batch),
            seed_word=seed_word(HADAMARD),
            negative_low=negative_low,
            negative_high=negative_high,
            **kernel_flags(scale_format, stochastic=measures is not None, packed=packed, blocked=blocked),
            BLOCK_G=block_g,
            BLOCK_R=block_r,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return words.view(torch.uint8), scale.view(torch.float8_e8m0fnu)
