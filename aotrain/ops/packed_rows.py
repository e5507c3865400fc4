"""Rows of codes with their scales beside them, as bytes: what one collective can carry.

    row of K columns:  [ K codes | scale bytes of the row | zeros up to a multiple of 16 ]

Bytes per row: K + ceil(K / 32) for MXFP8 and K + 4 for float8 with one scale per row, rounded up to 16, so that every
row begins where a 16-byte access can. At K = 7168: 7392 and 7184, of 14336 in bfloat16.
"""

import torch

from aotrain.formats import ScaledTensor, Scaling, scale_shape

ROW_ALIGNMENT = 16


def packed_width(num_columns: int, scaling: Scaling) -> int:
    """Bytes of a packed row.

    Raises:
        ValueError: elements that are not 8 bits, or scales that rows share.
    """
    if scaling.block[0] != 1 or scaling.element.bits != 8:
        raise ValueError(
            f"packing rows got {scaling}; want 8-bit elements and scales of one row each, such as 1 x 32 or rowwise."
        )
    size = num_columns + _scale_bytes(num_columns, scaling)
    return -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack_rows(q: ScaledTensor) -> torch.Tensor:
    """uint8 [rows, packed_width(K)] of quantized rows [rows, K]."""
    rows, columns = q.data.shape
    width = packed_width(columns, q.scaling)
    parts = [q.data.view(torch.uint8), q.scale.contiguous().view(torch.uint8)]
    padding = width - columns - parts[1].shape[1]
    if padding:
        parts.append(parts[0].new_zeros(rows, padding))
    return torch.cat(parts, dim=1)


def unpack_rows(packed: torch.Tensor, num_columns: int, scaling: Scaling) -> ScaledTensor:
    """The quantized rows of `pack_rows`; codes and one-byte scales are views of `packed`, not contiguous."""
    scale_end = num_columns + _scale_bytes(num_columns, scaling)
    scale = packed[:, num_columns:scale_end]
    if scaling.scale.dtype.itemsize > 1:
        # A view needs scales aligned to their size; contiguous() would leave those of a single row where they are.
        scale = scale.clone(memory_format=torch.contiguous_format)
    return ScaledTensor(packed[:, :num_columns].view(scaling.element.dtype), scale.view(scaling.scale.dtype), scaling)


def _scale_bytes(num_columns: int, scaling: Scaling) -> int:
    return scale_shape((1, num_columns), scaling.block)[1] * scaling.scale.dtype.itemsize
