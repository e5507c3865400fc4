"""The grouped products of MXFP8 operands on tensor cores, by `torch._scaled_grouped_mm`.

What that takes was read in its source (aten/src/ATen/native/cuda/GroupedBlas.cpp and FBGEMM's kernel behind it): e4m3
with E8M0 scales of 1 x 32 in tiles of 128 x 4 (`formats.scale_layout`), K in multiples of 32 and N of 16, a bfloat16
result. Scales are tiled group by group, each group's padded to whole tiles for itself, the next one's right after:

- **rows** ("2d-3d"): groups of any number of rows. A group has ceil(rows / 128) rows of tiles, none if it is empty.
- **contracted** ("2d-2d"): groups of multiples of 32 columns, which `grouped_cast_t` provides. A group has
  ceil(columns / 128) columns of tiles, and its rows of tiles follow each other at that width.

Where a group's tiles begin follows from the offsets on the device; how many there are at most, from their number. So
nothing waits. Rearranging moves 1/32 of what the operand has, by torch's own kernels.

Which GPUs have these products is found by trying, one small product with a known answer per direction, where the dense
MX product works (`mx_mm`): CUTLASS for Blackwell must not be launched on what cannot run it.
"""

import functools

import torch

from aotrain.formats import FLOAT8_E4M3, SCALE_FORMATS, ScaledTensor, Scaling, dequantize, is_mx, to_blocked
from aotrain.formats.scale_layout import TILE_COLUMNS, TILE_ROWS
from aotrain.formats.scaling import BLOCKWISE_1X32
from aotrain.kernels.grouped_cast import pad_groups
from aotrain.kernels.groups import row_groups
from aotrain.kernels.mx_mm import mx_mm_problem

# Of the contracted dimension, and of the columns of the result.
_BLOCK = BLOCKWISE_1X32[1]
_COLUMN_ALIGNMENT = 16
# Groups of several tiles of scales, ragged, empty, in a matrix that has rows of no group; K and N.
_PROBE_SIZES = (40, 0, 130, 96)
_PROBE_K, _PROBE_N = 160, 144
_PROBE_TOLERANCE = 2.0**-6


def takes(a: ScaledTensor, b: ScaledTensor, contracted: int, columns: int, out_dtype: torch.dtype) -> bool:
    """Whether these are operands of the native product.

    Args:
        a, b: operands.
        contracted: size of the contracted dimension, all groups together where it is theirs.
        columns: of the result.
        out_dtype: of the result.
    """
    return (
        is_mx(a.scaling)
        and is_mx(b.scaling)
        and a.scaling.element == b.scaling.element == FLOAT8_E4M3
        and out_dtype == torch.bfloat16
        and contracted % _BLOCK == 0
        and columns % _COLUMN_ALIGNMENT == 0
    )


def problem(device: torch.device, *, contracted: bool) -> str | None:
    """Why this GPU has no native product of groups of rows, or of groups that are contracted; None when it has."""
    name = FLOAT8_E4M3.name
    return mx_mm_problem(device, name, name, torch.bfloat16) or _probed(device, contracted)


def rows(a: ScaledTensor, b: ScaledTensor, ends: torch.Tensor) -> torch.Tensor:
    """bfloat16 [M, N] of a [M, K] and b [E, N, K]; rows of no group are undefined."""
    scales = blocked_rows(a.scale, ends), to_blocked(b.scale)
    return torch._scaled_grouped_mm(a.data, b.data.mT, *scales, offs=ends, out_dtype=torch.bfloat16)


def contracted(a: ScaledTensor, b: ScaledTensor, padded_ends: torch.Tensor) -> torch.Tensor:
    """bfloat16 [E, N, K] of a [N, columns] and b [K, columns], in groups of multiples of 32 columns, none empty."""
    scales = (blocked_columns(q.scale, padded_ends) for q in (a, b))
    return torch._scaled_grouped_mm(a.data, b.data.t(), *scales, offs=padded_ends, out_dtype=torch.bfloat16)


def blocked_rows(scale: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Tiles of each group's scales, one group after the other.

    Args:
        scale: float8_e8m0fnu [M, C], of groups of rows.
        ends: int32 [E], the row after the last of each.

    Returns:
        float8_e8m0fnu [rows, C rounded up to 4], memory that is to be read in order; rows is at most M + 128 E.
    """
    padded = pad_groups(scale.view(torch.uint8), ends, _whole_tiles(ends, TILE_ROWS), TILE_ROWS)
    return to_blocked(padded).view(padded.shape[0], -1).view(scale.dtype)


def blocked_columns(scale: torch.Tensor, padded_ends: torch.Tensor) -> torch.Tensor:
    """Tiles of each group's scales, one group after the other, where groups lie along the columns.

    Args:
        scale: float8_e8m0fnu [R, C], a column for 32 of the data's.
        padded_ends: int32 [E], the column of the data after the last of each group, multiples of 32.

    Returns:
        float8_e8m0fnu [R rounded up to 128, columns], memory that is to be read in order; columns is at most C + 4 E.
    """
    ends = padded_ends // _BLOCK
    tile_ends = _whole_tiles(ends, TILE_COLUMNS)
    padded = pad_groups(scale.view(torch.uint8).t(), ends, tile_ends, TILE_COLUMNS).t()
    row_tiles, column_tiles = -(-padded.shape[0] // TILE_ROWS), padded.shape[1] // TILE_COLUMNS
    tiles = to_blocked(padded).view(row_tiles * column_tiles, TILE_ROWS * TILE_COLUMNS)
    # Tile (r, c) of the whole goes behind the tiles of earlier groups, at the width of its own; what is left over is
    # one more group.
    tile_ends = tile_ends // TILE_COLUMNS
    bounds = torch.cat([tile_ends.new_zeros(1), tile_ends, tile_ends.new_full((1,), column_tiles)]).long()
    group = row_groups(tile_ends, column_tiles)
    first = bounds.index_select(0, group)
    width = bounds.index_select(0, group + 1) - first
    row, column = (torch.arange(size, device=scale.device) for size in (row_tiles, column_tiles))
    place = row_tiles * first + row.unsqueeze(1) * width + column - first
    return (
        torch.empty_like(tiles).index_copy_(0, place.flatten(), tiles).view(row_tiles * TILE_ROWS, -1).view(scale.dtype)
    )


def _whole_tiles(ends: torch.Tensor, multiple: int) -> torch.Tensor:
    """Where groups end that are padded to multiples; unlike in a `GroupLayout`, an empty group stays empty."""
    sizes = ends.diff(prepend=ends.new_zeros(1))
    return ((sizes + (multiple - 1)) // multiple * multiple).cumsum(0, dtype=torch.int32)


@functools.lru_cache(maxsize=64)
def _probed(device: torch.device, contracted: bool) -> str | None:
    found = probe(device, contracted=contracted)
    return None if found is None else f"{torch.cuda.get_device_name(device)} {found}"


def probe(device: torch.device, *, contracted: bool) -> str | None:
    """Multiply groups whose blocks have scales of their own, and compare with products of dequantized matrices."""
    kind = "contracted groups" if contracted else "groups of rows"
    try:
        got, want = (_probe_contracted if contracted else _probe_rows)(device)
        wrong = ~((got.float() - want).abs() <= _PROBE_TOLERANCE * want.abs().amax())
        return f"computes MX products of {kind} wrongly" if bool(wrong.any()) else None
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"has no MX product of {kind} ({str(error).splitlines()[0][:120]})"


def _probe_rows(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    sizes, total = _PROBE_SIZES, sum(_PROBE_SIZES)
    a = _known((total + 8, _PROBE_K), 7, device)
    b = _known((len(sizes), _PROBE_N, _PROBE_K), 11, device)
    ends = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    lhs, rhs = dequantize(a)[:total].split(sizes), dequantize(b)
    want = torch.cat([part @ matrix.t() for part, matrix in zip(lhs, rhs, strict=True)])
    return rows(a, b, ends)[:total], want


def _probe_contracted(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [-(-max(size, 1) // _BLOCK) * _BLOCK for size in _PROBE_SIZES]
    a, b = (_known((size, sum(sizes) + _BLOCK), step, device) for size, step in ((_PROBE_K, 7), (_PROBE_N, 11)))
    ends = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    lhs, rhs = (dequantize(q)[:, : sum(sizes)].split(sizes, 1) for q in (a, b))
    return contracted(a, b, ends), torch.stack([x @ y.t() for x, y in zip(lhs, rhs, strict=True)])


def _known(shape: tuple[int, ...], step: int, device: torch.device) -> ScaledTensor:
    """Numbers from 0 to about 1 without a sign, so that what is in the wrong place is not lost in a cancellation."""
    number = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    block = torch.arange(number.numel() // _BLOCK, device=device).view(*shape[:-1], -1)
    data = (number * step % 61).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = (block * 5 % 9 + 123).to(torch.uint8).view(torch.float8_e8m0fnu)
    scaling = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
    return ScaledTensor(data, scale, scaling)
