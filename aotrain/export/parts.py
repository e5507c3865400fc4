"""Encode a weight in parts of whole rows, so that temporaries stay small whatever its size.

Schemes make float32 copies, masks and indices of what they encode, up to 50 bytes per element. Scales never span more
than 128 rows once a two-level scheme's global scale is given, so parts of a multiple of 128 rows give the same bits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from aotrain.quantization.schemes import Encoded, TensorScheme

_ROWS = 128
_ELEMENTS = 2**17


class Rows(Protocol):
    """A tensor, or one in a file: what has rows."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def row_parts(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the rows of a matrix, each but the last of a multiple of 128 rows."""
    return _slices(shape, _ROWS)


def dense_parts(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first dimension of a tensor, with at least one entry each."""
    return _slices(shape, 1)


def _slices(shape: Sequence[int], multiple: int) -> Iterator[slice]:
    rows, columns = shape[0], math.prod(shape[1:])
    step = max(1, _ELEMENTS // max(columns, 1) // multiple) * multiple
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def rows_of(per_row: Rows, rows: int, part: slice) -> torch.Tensor:
    """The part of a tensor with one entry per row, or per 128 rows, of a matrix with so many rows."""
    per_entry = 1 if per_row.shape[0] == rows else _ROWS
    return per_row[part.start // per_entry : -(-part.stop // per_entry)]


def entries_for(count: int, part: slice, rows: int) -> int:
    """How many entries a matrix of so many rows has, where its first part has `count`: one per row or per 128 rows."""
    return rows if count == part.stop else -(-rows // _ROWS)


def encode_in_parts(
    scheme: TensorScheme, weight: torch.Tensor, scale: torch.Tensor | None, global_scale: torch.Tensor | None
) -> Encoded:
    """What `scheme.encode` gives for a matrix, bit for bit."""
    rows, parts = weight.shape[0], []
    for part in row_parts(weight.shape):
        own = None if scale is None else rows_of(scale, rows, part)
        parts.append(scheme.encode(weight[part], scale=own, global_scale=global_scale))
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return Encoded(
        torch.cat([part.data for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        parts[0].global_scale,
    )
