"""The order in memory in which tensor cores read block scales: tiles of 128 x 4, called SWIZZLE_32_4_4 by torch.

A matrix of one-byte scales [rows, columns], columns along the contracted dimension, is padded with zero bytes to
multiples of 128 and 4. Tiles follow each other row of tiles by row of tiles; inside a tile, (row, column) is at byte

    (row % 32) * 16 + row // 32 * 4 + column

so that the four scales that a row needs per step, and those of the rows 32, 64 and 96 below it, are 16 adjacent bytes.

Source: cuBLAS documentation, "1D Block Scaling Factors Layout"; the same for E8M0 (MX) and E4M3 (NVFP4) scales.
"""

import torch

TILE_ROWS, TILE_COLUMNS = 128, 4


def blocked_size(rows: int, columns: int) -> int:
    """Bytes that a [rows, columns] matrix of scales takes in tiles."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS) * TILE_ROWS * TILE_COLUMNS


def to_blocked(scale: torch.Tensor) -> torch.Tensor:
    """Scales [..., rows, columns] as tiles, [..., blocked_size(rows, columns)], each matrix for itself.

    Args:
        scale: of a one-byte dtype, e.g. float8_e8m0fnu, float8_e4m3fn or uint8; any strides.
    """
    if scale.dim() < 2 or scale.dtype.itemsize != 1:
        raise ValueError(
            f"to_blocked got shape {tuple(scale.shape)} and dtype {scale.dtype}; want a matrix of one-byte scales."
        )
    rows, columns = scale.shape[-2:]
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padding = (0, column_tiles * TILE_COLUMNS - columns, 0, row_tiles * TILE_ROWS - rows)
    padded = torch.nn.functional.pad(scale.view(torch.uint8), padding)
    # [..., row tiles, 4, 32, column tiles, 4]
    tiles = padded.unflatten(-1, (column_tiles, TILE_COLUMNS)).unflatten(-3, (row_tiles, 4, 32))
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5).view(scale.dtype)


def from_blocked(blocked: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `to_blocked`: [..., blocked_size(rows, columns)] to [..., rows, columns]."""
    if blocked.shape[-1] != blocked_size(rows, columns) or blocked.dtype.itemsize != 1:
        raise ValueError(
            f"from_blocked got {blocked.shape[-1]} scales of {blocked.dtype} for a [{rows}, {columns}] matrix; "
            f"want {blocked_size(rows, columns)} of one byte."
        )
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    tiles = blocked.view(torch.uint8).unflatten(-1, (row_tiles, column_tiles, 32, 4, TILE_COLUMNS))
    padded = tiles.transpose(-3, -2).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return padded[..., :rows, :columns].contiguous().view(blocked.dtype)
