"""quantize, dequantize, fake_quantize: the casts between a high-precision tensor and scaled low-precision data."""

from typing import NamedTuple

import torch

from aotrain.formats.decode import decode_elements
from aotrain.formats.rounding import round_nearest, round_stochastic
from aotrain.formats.scaling import Scaling, block_amax, expand_blocks, scale_shape, scale_to_float, scales_from_amax


class ScaledTensor(NamedTuple):
    """Low-precision data with its scales: x ~= data * scale, each scale repeated over its block.

    One code per element, also of the formats below 8 bits, and one scale per block in row-major order: what hardware
    reads, two 4-bit codes in a byte and scales in tiles, are layouts of it (`formats.packing`, `formats.scale_layout`).

    Invariants: `data.shape` is the shape of the quantized tensor, `scale.shape == scale_shape(data.shape, block)`, and
    quantizing `dequantize(q)` again with q's own scale gives q's data bit for bit.
    """

    data: torch.Tensor
    scale: torch.Tensor
    scaling: Scaling


def quantize(
    x_hp: torch.Tensor,
    scaling: Scaling,
    *,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> ScaledTensor:
    """Scale, saturate and round a tensor: data = round(clamp(fp32(x) * inv_scale)).

    Args:
        x_hp: floating-point tensor [..., rows, columns]; float16, bfloat16 or float32.
        scaling: target format and block shape.
        scale: scales to use instead of those of x's own blocks, in `scaling.scale.dtype` and the shape
            `scale_shape(x.shape, scaling.block)`.
        amax: float32 of that shape: largest magnitudes to take the scales from instead of those of x's own blocks, for
            an x that is a part of a larger tensor. The codes are then those of the larger tensor.
        noise: integers in [0, 2^16) of x's shape, required for stochastic rounding and unused otherwise.

    Raises:
        TypeError: x is not a floating-point tensor of at most 32 bits.
        ValueError: x has fewer than 2 dimensions, or a given scale or amax has the wrong shape or dtype or both are
            given, or noise is missing, or the scaling has a Hadamard transform.
    """
    if scaling.hadamard:
        raise ValueError(f"quantize got {scaling}; it does not transform: use quantize_mx.")
    if x_hp.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantize got {x_hp.dtype}; want float32, bfloat16 or float16: cast the tensor first.")
    x = x_hp.float()
    if scale is not None and amax is not None:
        raise ValueError("quantize got both a scale and an amax; the scale follows from the amax: give one of them.")
    if scale is None:
        if amax is None:
            amax = block_amax(x, scaling.block)
        else:
            _check_given("amax", amax, x_hp, scaling, torch.float32)
        scale, inv_scale = scales_from_amax(amax, scaling)
    else:
        _check_given("scale", scale, x_hp, scaling, scaling.scale.dtype)
        inv_scale = scale_to_float(scale).reciprocal()
    scaled = x * expand_blocks(inv_scale, x.shape, scaling.block)
    if scaling.rounding == "nearest":
        return ScaledTensor(round_nearest(scaled, scaling.element), scale, scaling)
    if noise is None:
        raise ValueError("Stochastic rounding needs `noise`: integers in [0, 2^16), e.g. from philox_bits16.")
    return ScaledTensor(round_stochastic(scaled, scaling.element, noise), scale, scaling)


def dequantize(q: ScaledTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """fp32(data) * fp32(scale), rounded once to `dtype`; same shape as `q.data`."""
    scale = expand_blocks(scale_to_float(q.scale), q.data.shape, q.scaling.block)
    return (decode_elements(q.data, torch.float32, q.scaling.element) * scale).to(dtype)


def fake_quantize(x_hp: torch.Tensor, scaling: Scaling, *, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The value x takes when stored in the format: dequantize(quantize(x)) in x's dtype. Has no gradient rule."""
    return dequantize(quantize(x_hp, scaling, noise=noise), x_hp.dtype)


def _check_given(name: str, given: torch.Tensor, x_hp: torch.Tensor, scaling: Scaling, dtype: torch.dtype) -> None:
    want = scale_shape(x_hp.shape, scaling.block)
    if tuple(given.shape) != want or given.dtype != dtype:
        raise ValueError(
            f"quantize got {name} of shape {tuple(given.shape)} and dtype {given.dtype} for a tensor of shape "
            f"{tuple(x_hp.shape)}; want shape {want} and dtype {dtype} for blocks of {scaling.block}."
        )
