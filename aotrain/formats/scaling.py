"""Scaling: element format x scale format x block shape, and the scale of a block from its largest magnitude.

Tensorwise, rowwise, 1x32 and 128x128 scaling are the same operation with different block shapes: a block of rows and
columns of the last two dimensions shares one scale; -1 means the whole dimension.

| scale format   | inv_scale (applied by quantize)                                     | scale (applied by dequantize) |
|----------------|---------------------------------------------------------------------|-------------------------------|
| `float32`      | fp32(max / clamp(fp64(amax), min=1e-12))                            | fp32(1 / inv_scale)           |
| `float32_pow2` | the same, rounded down to a power of two                            | its exact reciprocal          |
| `e8m0_*`       | 2^(127 - byte), byte from `aotrain.formats.e8m0`                    | 2^(byte - 127), stored as e8m0|

The lower bound 1e-12 keeps the scale of an all-zero block finite and positive, so zeros quantize to zeros.
"""

import math
from dataclasses import dataclass

import torch

from aotrain.formats.e8m0 import E8M0_ROUNDINGS, decode_e8m0, e8m0_from_amax, e8m0_inverse
from aotrain.formats.element import ElementFormat

AMAX_MIN = 1e-12

Block = tuple[int, int]
TENSORWISE: Block = (-1, -1)
ROWWISE: Block = (1, -1)
COLWISE: Block = (-1, 1)
BLOCKWISE_1X16: Block = (1, 16)
BLOCKWISE_1X32: Block = (1, 32)
BLOCKWISE_1X128: Block = (1, 128)
BLOCKWISE_16X16: Block = (16, 16)
BLOCKWISE_128X128: Block = (128, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleFormat:
    """How scales are represented and rounded.

    Attributes:
        name: key in `SCALE_FORMATS`.
        dtype: torch dtype of the stored scale.
        power_of_two: whether every scale is a power of two, so that applying it is exact.
        e8m0_rounding: one of `E8M0_ROUNDINGS` for the 8-bit exponent formats, None for float32 scales.
    """

    name: str
    dtype: torch.dtype
    power_of_two: bool
    e8m0_rounding: str | None = None


FLOAT32_SCALE = ScaleFormat(name="float32", dtype=torch.float32, power_of_two=False)
FLOAT32_POW2_SCALE = ScaleFormat(name="float32_pow2", dtype=torch.float32, power_of_two=True)

SCALE_FORMATS: dict[str, ScaleFormat] = {row.name: row for row in (FLOAT32_SCALE, FLOAT32_POW2_SCALE)} | {
    f"e8m0_{rounding}": ScaleFormat(
        name=f"e8m0_{rounding}", dtype=torch.float8_e8m0fnu, power_of_two=True, e8m0_rounding=rounding
    )
    for rounding in E8M0_ROUNDINGS
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What a high-precision operand is quantized to. Immutable and hashable.

    Attributes:
        element: format of the data.
        scale: format of the scales.
        block: (rows, columns) of the last two dimensions that share a scale; -1 is the whole dimension.
        rounding: "nearest" (ties to even) or "stochastic".
        hadamard: size of the random Hadamard transform along the columns before the cast, a power of two; 0 is none.
            The codes are then those of the transformed matrix: `formats.mx` makes them, `quantize` does not.
    """

    element: ElementFormat
    scale: ScaleFormat = FLOAT32_SCALE
    block: Block = TENSORWISE
    rounding: str = "nearest"
    hadamard: int = 0

    def __post_init__(self) -> None:
        if any(size < 1 and size != -1 for size in self.block):
            raise ValueError(f"Scaling.block got {self.block}; want two sizes >= 1, or -1 for a whole dimension.")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Scaling.rounding got {self.rounding!r}; want 'nearest' or 'stochastic'.")
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise ValueError(f"Scaling.hadamard got {self.hadamard}; want a power of two, or 0 for no transform.")

    def __str__(self) -> str:
        stochastic = "/stochastic" if self.rounding == "stochastic" else ""
        hadamard = f"/hadamard{self.hadamard}" if self.hadamard else ""
        return f"{self.element.name}/{self.scale.name}/{_block_name(self.block)}{stochastic}{hadamard}"


def scale_shape(shape: torch.Size | tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a tensor: [..., rows / block rows, columns / block columns], rounded up for ragged tails.

    A dimension covered whole by the block has one scale even when it is empty, so tensorwise scales are always [1, 1].
    """
    if len(shape) < 2:
        raise ValueError(
            f"Block scaling needs at least 2 dimensions, got shape {tuple(shape)}; "
            "reshape a vector to [1, n] (or [n, 1]) first."
        )
    counts = (1 if size == -1 else -(-dim // size) for dim, size in zip(shape[-2:], block, strict=True))
    return (*shape[:-2], *counts)


def block_amax(x: torch.Tensor, block: Block) -> torch.Tensor:
    """Largest magnitude of each block, float32, of shape `scale_shape(x.shape, block)`.

    NaN propagates; an empty block gives 0.
    """
    shape = scale_shape(x.shape, block)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    rows, columns = x.shape[-2:]
    block_rows, block_columns = (dim if size == -1 else size for dim, size in zip((rows, columns), block, strict=True))
    padding = (0, shape[-1] * block_columns - columns, 0, shape[-2] * block_rows - rows)
    magnitude = x.abs()
    if any(padding):
        magnitude = torch.nn.functional.pad(magnitude, padding)
    tiles = magnitude.unflatten(-1, (shape[-1], block_columns)).unflatten(-3, (shape[-2], block_rows))
    return tiles.amax(dim=(-3, -1)).float()  # [..., rows / br, br, columns / bc, bc] -> [..., rows / br, columns / bc]


def expand_blocks(scale: torch.Tensor, shape: torch.Size | tuple[int, ...], block: Block) -> torch.Tensor:
    """Repeat each block's scale over the elements of the block: [..., rows, columns] or a shape broadcastable to it."""
    for dim, size in zip((-2, -1), block, strict=True):
        if size > 1:
            scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, shape[dim])
    return scale


def scales_from_amax(amax: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and inverse scale of blocks with the given largest magnitudes.

    A block with an infinity gets inv_scale 0 and scale inf, one with a NaN gets NaN for both: every element of such a
    block dequantizes to NaN, so overflow stays visible (docs/numerics.md, section 3).

    Args:
        amax: float32, any shape, values >= 0 or NaN.
        scaling: element and scale format.

    Returns:
        (scale, inv_scale): scale in `scaling.scale.dtype`, inv_scale in float32, both of amax's shape.
    """
    if scaling.scale.e8m0_rounding is not None:
        byte = e8m0_from_amax(amax, scaling.element, scaling.scale.e8m0_rounding)
        return byte.view(torch.float8_e8m0fnu), e8m0_inverse(byte)
    bounded = amax.double().clamp(min=AMAX_MIN)
    # A tensor numerator: on CPU, torch computes `scalar / tensor` as scalar * reciprocal, not correctly rounded.
    inv_scale = (torch.full_like(bounded, scaling.element.max) / bounded).float()
    if scaling.scale.power_of_two:
        inv_scale = floor_to_power_of_two(inv_scale)
    # One NaN whatever the input's, for equal bits on every machine (formats/rounding.py).
    return inv_scale.reciprocal().masked_fill(inv_scale.isnan(), math.nan), inv_scale


def scale_to_float(scale: torch.Tensor) -> torch.Tensor:
    """The scale as float32, whatever its storage format."""
    return decode_e8m0(scale.view(torch.uint8)) if scale.dtype == torch.float8_e8m0fnu else scale


def floor_to_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """Largest power of two <= x for positive normal float32 x, by clearing the mantissa; 0, inf and NaN are kept.

    Not exp2(floor(log2(x))): log2 rounds up to the next integer just below most powers of two.
    """
    floored = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(x.isnan(), x, floored)


def _block_name(block: Block) -> str:
    named = {TENSORWISE: "tensorwise", ROWWISE: "rowwise", COLWISE: "colwise"}
    return named.get(block, f"{block[0]}x{block[1]}")
