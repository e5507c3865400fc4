"""Sizes that hardware matrix products take: multiples of the rows and columns of an operand, and zeros up to them.

`operand_multiples` is the one table of what the native backends of `scaled_mm` demand. Casts on a GPU write operands of
such sizes at once (`scaled_cast(pad=)`); `scaled_mm` pads an operand that comes without, in a pass of its own.
"""

from typing import Literal

import torch

from aotrain.formats import BLOCKWISE_1X128, BLOCKWISE_128X128, Scaling, is_mx
from aotrain.formats.scaling import Block

# (multiple of the rows, multiple of the columns).
Multiples = tuple[int, int]
UNPADDED: Multiples = (1, 1)

# What cuBLASLt demands of the leading dimensions of float8 operands.
NATIVE_ALIGNMENT = 16


def operand_multiples(x: torch.Tensor, scaling: Scaling, side: Literal["lhs", "rhs"]) -> Multiples:
    """Multiples of the rows and columns that the native product on x's device takes of an operand.

    Args:
        x: the operand [rows, columns] before or after its cast, contracted along its columns.
        scaling: its format.
        side: "lhs" for a, "rhs" for b of `scaled_mm`.

    Returns:
        For `scaled_cast(pad=)`; (1, 1) on devices other than GPUs, where products are emulated, and for MX, whose
        products pad codes and scales together.
    """
    if x.device.type != "cuda" or is_mx(scaling):
        return UNPADDED
    return native_multiples(x.shape[0], scaling.element.name == "int8", scaling.block, side)


def native_multiples(rows: int, int8: bool, block: Block, side: Literal["lhs", "rhs"]) -> Multiples:
    """`operand_multiples` on a GPU."""
    if int8:  # of an lhs, more than 16 rows
        return (32 if side == "lhs" and rows <= 16 else 8), 8
    if block in (BLOCKWISE_1X128, BLOCKWISE_128X128):
        # A scale of 1x128 is read down its rows, 16 bytes at a time, hence multiples of 4 rows.
        return 4 if side == "lhs" else 128 if block == BLOCKWISE_128X128 else NATIVE_ALIGNMENT, 128
    return 1 if side == "lhs" else NATIVE_ALIGNMENT, NATIVE_ALIGNMENT


def padded_shape(shape: torch.Size | tuple[int, ...], multiples: Multiples) -> tuple[int, ...]:
    """The shape [..., rows, columns] with its last two dimensions rounded up to multiples."""
    sizes = (-(-size // m) * m if m > 1 else size for size, m in zip(shape[-2:], multiples, strict=True))
    return (*shape[:-2], *sizes)


def zero_pad(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """x [..., rows, columns] with zeros after its rows and columns up to a shape; x itself where it has that shape.

    Code 0 is zero in float8 and int8.
    """
    rows, columns = shape[-2] - x.shape[-2], shape[-1] - x.shape[-1]
    if rows == 0 == columns:
        return x
    source = x.view(torch.uint8) if x.dtype.itemsize == 1 else x  # torch pads no float8
    return torch.nn.functional.pad(source, (0, columns, 0, rows)).view(x.dtype)
