"""scaled_cast on a GPU, rowwise: one program quantizes a tile of whole rows.

    amax[m]     = max_k |x[m, k]|
    scale[m], inv_scale[m] from amax[m]            (formats.scales_from_amax)
    data[m, k]  = saturate(x[m, k] * inv_scale[m])

Bytes per element of a 16-bit x: 2 read and 1 written, plus 4 per row for the scale: every element is read and every
code written once. A row that fits a tile stays in registers between the maximum and the cast. A longer row (more than
16384 elements) is read twice by the same program, 5 bytes per element, of which the second read finds most of the row
in the L2 cache: a row is 57 KB at 28672 columns. Splitting such a row over programs would need a second launch or a
grid barrier between maximum and cast.

This file does not do other block shapes, E8M0 scales, the fnuz formats or a transposed copy. A column-major x is
quantized by `scaled_cast_tiles`: its rows do not fit a program, and with whole rows in one program only a few programs
would share the work.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aotrain.formats import ROWWISE, ElementFormat, ScaleFormat, scale_shape
from aotrain.formats.scaling import AMAX_MIN
from aotrain.kernels._padding import UNPADDED, Multiples, padded_shape
from aotrain.kernels.triton._numerics import magnitude_bits, saturating_cast, scales_from_amax_bits


class Config(NamedTuple):
    """Tile shape and warps of one launch."""

    block_m: int
    block_k: int
    num_warps: int


# The first entry whose block_k covers K. Each keeps 32 elements per thread (four 16-byte loads of a 16-bit type in
# flight) and at least 4096 elements per program. Chosen from compiled register counts
# (benchmarks/results/aot_kernels.csv); not measured on a GPU yet.
ROW_MAJOR_CONFIGS = (
    Config(32, 128, 4),
    Config(8, 512, 4),
    Config(4, 1024, 4),
    Config(2, 2048, 4),
    Config(1, 4096, 4),
    Config(1, 8192, 8),
    Config(1, 16384, 16),
)
# Two passes over rows longer than the last entry above.
LONG_ROW_CONFIG = Config(1, 8192, 8)


@triton.jit
def padded_size(size, MULTIPLE: tl.constexpr):
    """The size rounded up. The compiler knows the result for a multiple, and vectorizes accesses accordingly."""
    if MULTIPLE == 1:
        padded = size
    else:
        padded = tl.cdiv(size, MULTIPLE) * MULTIPLE
    return padded


@triton.jit
def _scaled_cast_rowwise_kernel(
    x_ptr,  # [M, K], any strides
    data_ptr,  # [M, K] contiguous, 8-bit, both rounded up to multiples of PAD_M and PAD_K
    scale_ptr,  # [M] float32, likewise
    M,
    K,
    stride_m,
    stride_k,
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    PAD_M: tl.constexpr,  # 1 where M is a multiple already
    PAD_K: tl.constexpr,
    ROW_FITS_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ELEMENT: tl.constexpr = data_ptr.dtype.element_ty
    # 64-bit from here on: M * K and K * stride_k both exceed 2^31 elements in large models.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K).to(tl.int64)
    padded_m, padded_k = padded_size(M, PAD_M), padded_size(K, PAD_K)
    row_mask, padded_rows = rows < M, rows < padded_m
    x_rows = x_ptr + rows[:, None] * stride_m
    data_rows = data_ptr + rows[:, None] * padded_k

    if ROW_FITS_TILE:
        mask = row_mask[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows + columns[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
        scale, inv_scale = scales_from_amax_bits(
            tl.max(magnitude_bits(x), axis=1), ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO
        )
        data = saturating_cast(x * inv_scale[:, None], ELEMENT, ELEMENT_MAX)
        tl.store(data_rows + columns[None, :], data, mask=padded_rows[:, None] & (columns < padded_k)[None, :])
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + columns
            mask = row_mask[:, None] & (k < K)[None, :]
            x = tl.load(x_rows + k[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude_bits(x))
        scale, inv_scale = scales_from_amax_bits(tl.max(largest, axis=1), ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)
        for start in range(0, padded_k, BLOCK_K):
            k = start + columns
            mask = row_mask[:, None] & (k < K)[None, :]
            x = tl.load(x_rows + k[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
            data = saturating_cast(x * inv_scale[:, None], ELEMENT, ELEMENT_MAX)
            tl.store(data_rows + k[None, :], data, mask=padded_rows[:, None] & (k < padded_k)[None, :])
    tl.store(scale_ptr + rows, scale, mask=padded_rows)


def scaled_cast_rowwise(
    x_hp: torch.Tensor, element: ElementFormat, scale_format: ScaleFormat, pad: Multiples = UNPADDED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of a matrix with its own scale.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, any strides; fast where K is contiguous. CPU tensors work
            under TRITON_INTERPRET=1.
        element: FLOAT8_E4M3, FLOAT8_E5M2 or INT8.
        scale_format: `float32` or `float32_pow2`.
        pad: multiples that M and K of the result are rounded up to.

    Returns:
        (data [M, K] contiguous, scale [M, 1] float32), equal to formats.quantize of x with zeros up to these multiples,
        bit for bit.
    """
    num_rows, num_columns = x_hp.shape
    shape = padded_shape(x_hp.shape, pad)
    data = torch.empty(shape, dtype=element.dtype, device=x_hp.device)
    scale = torch.empty(scale_shape(shape, ROWWISE), dtype=torch.float32, device=x_hp.device)
    if num_rows == 0:
        return data, scale
    config, row_fits_tile = select_config(shape[1])
    pad_m, pad_k = needed_multiples(x_hp.shape, pad)
    with torch.cuda.device_of(x_hp):
        _scaled_cast_rowwise_kernel[(triton.cdiv(shape[0], config.block_m),)](
            x_hp,
            data,
            scale,
            num_rows,
            num_columns,
            *x_hp.stride(),
            **kernel_constants(element, scale_format),
            PAD_M=pad_m,
            PAD_K=pad_k,
            ROW_FITS_TILE=row_fits_tile,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return data, scale


def select_config(num_columns: int) -> tuple[Config, bool]:
    """The launch configuration for rows of this length, and whether a row fits its tile."""
    for config in ROW_MAJOR_CONFIGS:
        if num_columns <= config.block_k:
            return config, True
    return LONG_ROW_CONFIG, False


def needed_multiples(shape: torch.Size, pad: Multiples) -> Multiples:
    """1 for what is a multiple already: aligned sizes run the kernel without padding."""
    return tuple(m if size % m else 1 for size, m in zip(shape[-2:], pad, strict=True))  # pyrefly: ignore[bad-return]


@functools.lru_cache(maxsize=32)
def kernel_constants(element: ElementFormat, scale_format: ScaleFormat) -> dict[str, float | bool]:
    """Compile-time constants of the scale computation. Cached and shared: do not modify."""
    return {
        "ELEMENT_MAX": element.max,
        "INV_SCALE_MAX": torch.tensor(element.max / AMAX_MIN, dtype=torch.float32).item(),
        "POWER_OF_TWO": scale_format.power_of_two,
    }
