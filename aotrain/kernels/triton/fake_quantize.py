"""fake_quantize_affine on a GPU: values of the codes of integer formats, or their straight-through gradient.

    scale[g], zero_point[g] from the bounds of group g                       (formats.AffineFormat.parameters)
    step = round(x * (1 / scale))
    value = (clamp(step + zero_point, lo, hi) - zero_point) * scale
    grad_x = grad if lo <= step + zero_point <= hi, else 0; plus what is due to scales  (formats.scale_gradient)

Groups are rows of a contiguous matrix [groups, size]. One program has a tile of whole groups: values read every element
once and write it once, gradients read two. A group longer than a tile is read twice by the same program, in steps.

Every operation that the definition rounds to a 16-bit dtype is done in float32 and rounded to it. Zero points that are
values, and formats whose steps have no bound, are not done here: `kernels.fake_quantize.kernel_gap`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aotrain.formats import AffineFormat, ZeroPointDomain
from aotrain.formats.scale_gradient import constant_below

# 1.5 * 2^23: float32 numbers of this size have a spacing of 1, on both sides.
_SPACING_OF_ONE = tl.constexpr(12582912.0)
_MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)


class Config(NamedTuple):
    """Groups and elements of a tile, and warps of one launch."""

    block_groups: int
    block_size: int
    num_warps: int


# The first entry whose block_size covers a group. Chosen from compiled register counts
# (benchmarks/results/aot_kernels.csv); not measured on a GPU yet.
CONFIGS = (
    Config(128, 32, 4),
    Config(64, 64, 4),
    Config(32, 128, 4),
    Config(16, 256, 4),
    Config(4, 1024, 4),
    Config(1, 4096, 4),
    Config(1, 8192, 8),
)
# Two passes over groups longer than the last entry above.
LONG_CONFIG = Config(1, 4096, 8)


@triton.jit
def _round_to(x, DTYPE: tl.constexpr):
    """x, float32, rounded to a dtype, as float32."""
    if DTYPE == tl.float32:
        return x
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _cast_or_nan(x, regular, DTYPE: tl.constexpr):
    """x, float32, in a dtype; where it is not regular, the positive quiet NaN of that dtype without payload.

    The choice is between bits: a conversion of NaN is not the same NaN on every processor.
    """
    if DTYPE == tl.float32:
        bits = tl.where(regular, x.to(tl.int32, bitcast=True), 0x7FC00000)
    elif DTYPE == tl.bfloat16:
        bits = tl.where(regular, x.to(DTYPE).to(tl.int16, bitcast=True), 0x7FC0).to(tl.int16)
    else:
        bits = tl.where(regular, x.to(DTYPE).to(tl.int16, bitcast=True), 0x7E00).to(tl.int16)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _keys(x):
    """Integers in the order of float32 numbers, NaN beyond the infinities: floating-point maxima drop NaN on a GPU."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _MAGNITUDE_MASK, bits)


@triton.jit
def _scales(
    smallest,
    largest,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MAPPING: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST_NORMAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    STORED: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """(scale, 1 / scale, zero point) from the keys of bounds that include 0; NaN scales where one is not finite."""
    finite = (largest < _INFINITY_BITS) & (smallest > -_INFINITY_BITS - 1)
    low = tl.where(smallest < 0, smallest ^ _MAGNITUDE_MASK, 0).to(tl.float32, bitcast=True)
    low = tl.where(low < 0, low, 0.0)
    high = largest.to(tl.float32, bitcast=True)
    full = tl.zeros_like(high)
    zero_point = full + ZERO_POINT
    if MAPPING == "SYMMETRIC":
        scale = _round_to(tl.div_rn(tl.where(-low > high, -low, high), full + (HIGHEST - LOWEST) / 2), COMPUTE)
    elif MAPPING == "ASYMMETRIC":
        scale = _round_to(tl.div_rn(_round_to(high - low, COMPUTE), full + (HIGHEST - LOWEST)), COMPUTE)
    else:
        below = _round_to(tl.div_rn(low, full + LOWEST), COMPUTE)
        above = _round_to(tl.div_rn(high, full + HIGHEST), COMPUTE)
        scale = tl.where(below > above, below, above)
    scale = tl.where(scale > EPS, scale, EPS)
    if MAPPING == "ASYMMETRIC":
        steps = (_round_to(tl.div_rn(low, scale), COMPUTE) + _SPACING_OF_ONE) - _SPACING_OF_ONE
        zero_point = tl.clamp(LOWEST - steps, full + LOWEST, full + HIGHEST)
    scale = _round_to(scale, STORED)
    scale = tl.where(scale > SMALLEST_NORMAL, scale, SMALLEST_NORMAL)
    regular = finite & (scale <= _LARGEST)
    inverse = _round_to(tl.div_rn(full + 1.0, scale), PRODUCT)
    scale, inverse = _cast_or_nan(scale, regular, tl.float32), _cast_or_nan(inverse, regular, tl.float32)
    return scale, inverse, tl.where(regular, zero_point, 0.0)


@triton.jit
def _write(
    x,
    at,
    mask,
    scale,
    inverse,
    zero_point,
    grad_ptr,
    out_ptr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    PRODUCT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Values of a tile with a scale per row, or the gradient that passes it."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    low, high = (LOWEST - zero_point)[:, None], (HIGHEST - zero_point)[:, None]
    steps = (_round_to(x * inverse[:, None], PRODUCT) + _SPACING_OF_ONE) - _SPACING_OF_ONE
    if BACKWARD:
        inside = (steps >= low) & (steps <= high)  # no step of a broken group is
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, tl.where(inside, grad, tl.zeros_like(grad)), mask=mask)
    else:
        code = tl.where(steps > low, tl.where(steps < high, steps, high), low)
        value = code * scale[:, None]
        regular = tl.broadcast_to((scale == scale)[:, None], value.shape)
        tl.store(out_ptr + at, _cast_or_nan(value, regular, DTYPE), mask=mask)


@triton.jit
def _sum_neighbours(x, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of each row: of neighbours, then of neighbouring sums, and so on. Each sum is of two: it has one order."""
    if SIZE == 1:
        total = tl.sum(x, axis=1) + 0.0
    else:
        total = _sum_neighbours(tl.sum(tl.reshape(x, (GROUPS, SIZE // 2, 2)), axis=2), GROUPS, SIZE // 2)
    return total


@triton.jit
def _write_with_scales(
    x,
    columns,
    at,
    mask,
    scale,
    inverse,
    grad_ptr,
    out_ptr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    PRODUCT: tl.constexpr,
    STRAIGHT: tl.constexpr,
    CONSTANT_BELOW: tl.constexpr,
):
    """The gradient of a tile of whole groups and of their scales, as `formats.scale_gradient` defines it."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    GROUPS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    steps = (_round_to(x * inverse[:, None], PRODUCT) + _SPACING_OF_ONE) - _SPACING_OF_ONE
    code = tl.where(steps > LOWEST, tl.where(steps < HIGHEST, steps, HIGHEST), LOWEST)
    value = _round_to(code * scale[:, None], STRAIGHT)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    inside = (steps >= LOWEST) & (steps <= HIGHEST)
    straight = tl.where(inside, grad.to(tl.float32), 0.0)
    due = _sum_neighbours(grad.to(tl.float32) * value - straight * x, GROUPS, SIZE)
    magnitudes = tl.where(mask, x.to(tl.int32, bitcast=True) & _MAGNITUDE_MASK, -1)
    largest = tl.max(magnitudes, axis=1)
    where = tl.min(tl.where(magnitudes == largest[:, None], columns[None, :], SIZE), axis=1)
    here = columns[None, :] == where[:, None]
    extreme = tl.sum(tl.where(here, x, 0.0), axis=1)
    follows = (largest.to(tl.float32, bitcast=True) > CONSTANT_BELOW) & (scale == scale)
    due = tl.where(follows, tl.div_rn(due, tl.where(follows, extreme, 1.0)), 0.0)
    moved = straight + due[:, None]
    tl.store(out_ptr + at, tl.where(inside, grad, tl.zeros_like(grad)), mask=mask & ~here)
    tl.store(out_ptr + at, _cast_or_nan(moved, moved == moved, DTYPE), mask=mask & here)


@triton.jit
def _fake_quantize_kernel(
    x_ptr,  # [num_groups, size] contiguous
    grad_ptr,  # likewise; not read unless BACKWARD
    out_ptr,  # likewise; may be grad_ptr
    num_groups,
    size,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MAPPING: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST_NORMAL: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtypes of the arithmetic of bounds, of stored scales, of the elements' products
    STORED: tl.constexpr,
    PRODUCT: tl.constexpr,
    BACKWARD: tl.constexpr,
    WITH_SCALES: tl.constexpr,  # of groups that fit a tile, in a mapping without zero points
    CONSTANT_BELOW: tl.constexpr,
    FITS_TILE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # 64-bit from here on: elements exceed 2^31 in large models.
    groups = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    columns = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    rows, group_mask = groups[:, None] * size, (groups < num_groups)[:, None]
    if FITS_TILE:
        mask = group_mask & (columns < size)[None, :]
        x = tl.load(x_ptr + (rows + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
        keys = _keys(x)
        smallest, largest = tl.min(keys, axis=1), tl.max(keys, axis=1)
    else:
        low = tl.zeros((BLOCK_GROUPS, BLOCK_SIZE), tl.int32)
        high = low
        for start in range(0, size, BLOCK_SIZE):
            k = start + columns
            mask = group_mask & (k < size)[None, :]
            keys = _keys(tl.load(x_ptr + (rows + k[None, :]), mask=mask, other=0.0).to(tl.float32))
            low, high = tl.minimum(low, keys), tl.maximum(high, keys)
        smallest, largest = tl.min(low, axis=1), tl.max(high, axis=1)
    smallest, largest = tl.minimum(smallest, 0), tl.maximum(largest, 0)
    scale, inverse, zero_point = _scales(
        smallest, largest, LOWEST, HIGHEST, ZERO_POINT, MAPPING, EPS, SMALLEST_NORMAL, COMPUTE, STORED, PRODUCT
    )
    if FITS_TILE:
        mask = group_mask & (columns < size)[None, :]
        at = rows + columns[None, :]
        if WITH_SCALES:
            DTYPE: tl.constexpr = x_ptr.dtype.element_ty
            _write_with_scales(
                # pyrefly: ignore[unbound-name]
                *(x, columns, at, mask, scale, inverse, grad_ptr, out_ptr),
                *(LOWEST, HIGHEST, PRODUCT, DTYPE, CONSTANT_BELOW),
            )
        else:
            # pyrefly: ignore[unbound-name]
            _write(x, at, mask, scale, inverse, zero_point, grad_ptr, out_ptr, LOWEST, HIGHEST, PRODUCT, BACKWARD)
    else:
        for start in range(0, size, BLOCK_SIZE):
            k = start + columns
            mask = group_mask & (k < size)[None, :]
            at = rows + k[None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            _write(x, at, mask, scale, inverse, zero_point, grad_ptr, out_ptr, LOWEST, HIGHEST, PRODUCT, BACKWARD)


def fake_quantize(
    x: torch.Tensor,
    form: AffineFormat,
    grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    with_scales: bool = False,
) -> torch.Tensor:
    """Values of x's codes, or the gradient of x from theirs.

    Args:
        x: [..., K] with elements; float32, bfloat16 or float16; K a multiple of the group size. CPU tensors work under
            TRITON_INTERPRET=1.
        form: a format that `kernels.fake_quantize.kernel_gap` has nothing against.
        grad: gradient of the values, in x's shape, any floating dtype.
        out: contiguous, in the dtype of the result; default a new tensor. May be grad.
        with_scales: whether the gradient is also that of scales, for a format whose scales follow the maximum and
            groups that `fits_tile`.
    """
    x = x.contiguous()
    grad = None if grad is None else grad.contiguous()
    size = x.shape[-1] if form.group_size is None else form.group_size
    num_groups = x.numel() // size
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype if grad is None else grad.dtype, device=x.device)
    config, fits = select_config(size, with_scales=with_scales)
    with torch.cuda.device_of(x):
        _fake_quantize_kernel[(triton.cdiv(num_groups, config.block_groups),)](
            x,
            x if grad is None else grad,
            out,
            num_groups,
            size,
            **kernel_constants(form, x.dtype),
            BACKWARD=grad is not None,
            WITH_SCALES=with_scales,
            FITS_TILE=fits,
            BLOCK_GROUPS=config.block_groups,
            BLOCK_SIZE=config.block_size,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return out


def select_config(size: int, *, with_scales: bool = False) -> tuple[Config, bool]:
    """The launch configuration for groups of this size, and whether a group fits its tile."""
    for config in CONFIGS:
        if size <= config.block_size:
            # Twice the numbers per element, which take all registers of a thread otherwise.
            return config._replace(block_groups=max(1, config.block_groups // 2)) if with_scales else config, True
    return LONG_CONFIG, False


def fits_tile(size: int) -> bool:
    """Whether a group of this size is one program's, as its gradient with that of scales must be."""
    return select_config(size)[1]


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.lru_cache(maxsize=256)
def kernel_constants(form: AffineFormat, dtype: torch.dtype) -> dict[str, object]:
    """Compile-time constants of a format. Cached and shared: do not modify."""
    compute, stored = form.compute_dtype or dtype, form.scale_dtype or dtype
    return {
        "LOWEST": float(form.quant_min),
        "HIGHEST": float(form.quant_max),
        "ZERO_POINT": 0.0 if form.domain is ZeroPointDomain.NONE else float(form.center),
        "MAPPING": form.mapping.name,
        "CONSTANT_BELOW": constant_below(form, dtype),
        "EPS": form.smallest_scale(compute),
        "SMALLEST_NORMAL": torch.finfo(stored).smallest_normal,
        "COMPUTE": _TRITON_DTYPES[compute],
        "STORED": _TRITON_DTYPES[stored],
        "PRODUCT": _TRITON_DTYPES[torch.promote_types(compute, stored)],
    }
