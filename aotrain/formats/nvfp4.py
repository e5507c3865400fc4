"""NVFP4: e2m1 data, an e4m3 scale per block of 16 elements, and a float32 scale per matrix.

The second level exists because e4m3 covers 2^-9 to 448 only: the global scale places the largest block at 448.

With `T` the largest magnitude of the matrix and `amax` that of a block, each operation rounded to float32:

    global_scale = max(T, 1e-12) / 2688                             2688 = 448 * 6
    scale        = e4m3(clamp((amax / 6) / global_scale, 2^-9, 448))
    inv_scale    = (1 / global_scale) / scale
    data         = e2m1(clamp(x * inv_scale, -6, 6))
    x           ~= (data * scale) * global_scale                    data * scale is exact

Everything follows from the stored scales, so a given global scale (of a checkpoint, of all ranks) gives the same bits.
Rounding a block's scale to nearest may leave its amax up to 1/16 above 6 (more where the scale is subnormal): it
saturates, under stochastic rounding too.

The lower bound 2^-9, the smallest e4m3, keeps scales positive: blocks below 2^-18.8 T would round to a scale of zero. A
bound of 2^-6, the smallest normal e4m3, costs the blocks below 2^-14.8 T up to 15 dB (docs/LOG.md).

Activations and gradients have 1 x 16 blocks along the contracted dimension, weights 16 x 16, so that a weight and its
transpose have the same codes. A product reads one scale per row: `expand_blocks(scale, ..., (16, 1))` of the latter.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, on two-level scaling; the order of
operations, which it leaves open, and therefore the bits are those of torchao's `nvfp4_quantize` where a scale is at
least 2^-6, which is its lower bound.
"""

import math
from typing import NamedTuple

import torch

from aotrain.formats.decode import decode_elements
from aotrain.formats.element import FLOAT4_E2M1, FLOAT8_E4M3
from aotrain.formats.rounding import round_nearest, round_stochastic
from aotrain.formats.scaling import (
    AMAX_MIN,
    BLOCKWISE_1X16,
    TENSORWISE,
    Block,
    block_amax,
    expand_blocks,
    scale_shape,
)


class Nvfp4Tensor(NamedTuple):
    """NVFP4 data with its two levels of scales: x ~= (data * scale) * global_scale.

    Invariants: `data` is uint8 codes of e2m1, one per element, in the shape of the quantized tensor; `scale` is
    float8_e4m3fn, positive or NaN, of `scale_shape(data.shape, block)`; `global_scale` is float32
    [..., 1, 1], one per matrix; quantizing `dequantize_nvfp4(q)` again with q's own scales gives q's data bit for bit.
    """

    data: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor
    block: Block


def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """The float32 scale of a matrix with this largest magnitude; inf and NaN are kept."""
    bounded = amax.double().clamp(min=AMAX_MIN)
    scale = (bounded / torch.full_like(bounded, FLOAT8_E4M3.max * FLOAT4_E2M1.max)).float()
    return scale.masked_fill(scale.isnan(), math.nan)


def quantize_nvfp4(
    x_hp: torch.Tensor,
    *,
    block: Block = BLOCKWISE_1X16,
    global_scale: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> Nvfp4Tensor:
    """Scale, saturate and round a tensor to NVFP4.

    A block with a NaN or an infinity dequantizes to NaN; if the global scale is the tensor's own, all of its matrix.

    Args:
        x_hp: [..., rows, columns]; float32, bfloat16 or float16.
        block: (1, 16), or (16, 16) for weights.
        global_scale: float32, of one element or [..., 1, 1]; that of x's own matrices if not given.
        scale: e4m3 scales to use instead of those of x's own blocks; goes with `global_scale`.
        noise: integers in [0, 2^16) of x's shape for stochastic rounding; nearest if not given.
    """
    if x_hp.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantize_nvfp4 got {x_hp.dtype}; want float32, bfloat16 or float16: cast the tensor first.")
    x = x_hp.float()
    _check_scales(scale, global_scale, x.shape, block)
    if global_scale is None:
        global_scale = nvfp4_global_scale(block_amax(x, TENSORWISE))
    else:
        global_scale = global_scale.expand((*x.shape[:-2], 1, 1))
    if scale is None:
        scale = _block_scales(block_amax(x, block), global_scale)
    inv_scale = global_scale.reciprocal() / decode_elements(scale, torch.float32)
    scaled = x * expand_blocks(inv_scale, x.shape, block)
    data = round_nearest(scaled, FLOAT4_E2M1) if noise is None else round_stochastic(scaled, FLOAT4_E2M1, noise)
    return Nvfp4Tensor(data, scale, global_scale, block)


def dequantize_nvfp4(q: Nvfp4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(data * scale) * global_scale in float32, of which one product rounds, then rounded to `dtype`."""
    scale = expand_blocks(decode_elements(q.scale, torch.float32), q.data.shape, q.block)
    return (decode_elements(q.data, torch.float32, FLOAT4_E2M1) * scale * q.global_scale).to(dtype)


def _block_scales(amax: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    # A tensor as divisor: torch multiplies by the reciprocal of a scalar on GPUs.
    relative = amax / torch.full_like(amax, FLOAT4_E2M1.max) / global_scale
    relative = relative.clamp(min=FLOAT8_E4M3.min_subnormal).masked_fill(~amax.isfinite(), math.nan)
    return round_nearest(relative, FLOAT8_E4M3)


def _check_scales(
    scale: torch.Tensor | None, global_scale: torch.Tensor | None, shape: torch.Size, block: Block
) -> None:
    if scale is not None:
        want = scale_shape(shape, block)
        if global_scale is None or scale.shape != want or scale.dtype != FLOAT8_E4M3.dtype:
            raise ValueError(
                f"quantize_nvfp4 got scales of shape {tuple(scale.shape)} and dtype {scale.dtype} "
                f"{'without' if global_scale is None else 'with'} a global scale; want shape {want}, "
                f"{FLOAT8_E4M3.dtype}, and both levels."
            )
    if global_scale is not None:
        want = scale_shape(shape, TENSORWISE)
        if global_scale.dtype != torch.float32 or (global_scale.numel() != 1 and global_scale.shape != want):
            raise ValueError(
                f"quantize_nvfp4 got a global scale of shape {tuple(global_scale.shape)} and dtype "
                f"{global_scale.dtype}; want one float32 value, or float32 of shape {want}."
            )
