"""Groups of rows on a GPU: which group a tile belongs to, the layout of groups, and sums over groups.

A kernel over tiles of BLOCK rows that never reach across groups has `M // BLOCK + E + 1` programs, a number that needs
no offsets. Tile t belongs to the group e with

    start[e] // BLOCK + e  <=  t  <  start[e + 1] // BLOCK + e + 1

and is its tile `t - start[e] // BLOCK - e`. Every group gets at least as many tiles as it needs, since
`end // BLOCK - start // BLOCK + 1 >= ceil((end - start) / BLOCK)`; a program whose tile begins past its group's end
has nothing to do. The rows after the last group are group E.
"""

import torch
import triton
import triton.language as tl

# Rows and columns of one step. Not measured on a GPU yet.
_SUM_ROWS = 64
_SUM_COLUMNS = 64


@triton.jit
def group_of_tile(ends_ptr, num_groups, tile, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """(group, its first row, its number in the group) of a tile; group `num_groups` holds the rows after the last."""
    groups = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + groups, mask=groups < num_groups, other=0)
    before = (ends // BLOCK + groups + 1 <= tile) & (groups < num_groups)
    group = tl.sum(before.to(tl.int32), axis=0)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    return group, start, tile - start // BLOCK - group


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _group_layout_kernel(
    offsets_ptr,  # [E] int32
    ends_ptr,  # [E] int32
    padded_ends_ptr,  # [E] int32
    num_groups,
    rows,
    align,
    BLOCK_E: tl.constexpr,
):
    """12 bytes per group, one program."""
    groups = tl.arange(0, BLOCK_E)
    mask = groups < num_groups
    own = tl.minimum(tl.maximum(tl.load(offsets_ptr + groups, mask=mask, other=0), 0), rows)
    previous = tl.load(offsets_ptr + groups - 1, mask=mask & (groups > 0), other=0)
    ends = tl.associative_scan(own, 0, _larger)
    starts = tl.associative_scan(tl.minimum(tl.maximum(previous, 0), rows), 0, _larger)
    padded = (tl.maximum(ends - starts, 1) + align - 1) // align * align
    tl.store(ends_ptr + groups, ends, mask=mask)
    tl.store(padded_ends_ptr + groups, tl.associative_scan(padded, 0, _add), mask=mask)


@triton.jit
def _group_sum_kernel(
    x_ptr,  # [M, N], any strides
    ends_ptr,  # [E] int32
    sums_ptr,  # [E, N] contiguous
    N,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every element read once, in an order that depends on the offsets only."""
    group = tl.program_id(0)
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        offsets = rows[:, None] * stride_m + columns[None, :] * stride_n
        total += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + group.to(tl.int64) * N + columns, sums, mask=columns < N)


@triton.jit
def _zero_ungrouped_rows_kernel(
    x_ptr,  # [M, N] contiguous
    ends_ptr,  # the last element is the row after the last group
    num_groups,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes zeros to rows of no group and touches no other."""
    end = tl.load(ends_ptr + num_groups - 1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    if first_row + BLOCK_M > end:
        rows, columns = (
            first_row + tl.arange(0, BLOCK_M),
            tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N),
        )
        mask = ((rows >= end) & (rows < M))[:, None] & (columns < N)[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_N), x_ptr.dtype.element_ty)
        tl.store(x_ptr + rows[:, None] * N + columns[None, :], zeros, mask=mask)


def group_layout(offsets: torch.Tensor, rows: int, align: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ends, padded ends) of groups, from int32 end offsets [E] that may be out of order; E is at least 1."""
    ends, padded_ends = torch.empty_like(offsets), torch.empty_like(offsets)
    with torch.cuda.device_of(offsets):
        _group_layout_kernel[(1,)](
            *(offsets.contiguous(), ends, padded_ends),
            *(offsets.shape[0], rows, align),
            BLOCK_E=block_of_groups(offsets.shape[0]),
        )
    return ends, padded_ends


def group_sum(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[E, N] from x [M, N], neither empty: `aotrain.kernels.groups.group_sum`, summed in another order."""
    sums = torch.empty((ends.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _group_sum_kernel[(ends.shape[0], triton.cdiv(x.shape[1], _SUM_COLUMNS))](
            *(x, ends, sums, x.shape[1], *x.stride()),
            BLOCK_M=_SUM_ROWS,
            BLOCK_N=_SUM_COLUMNS,
            enable_fp_fusion=False,
        )
    return sums


def zero_ungrouped_rows(x: torch.Tensor, ends: torch.Tensor) -> None:
    """Set the rows of a contiguous matrix that belong to no group to zero; at least one group."""
    rows, columns = x.shape
    with torch.cuda.device_of(x):
        _zero_ungrouped_rows_kernel[(triton.cdiv(rows, _SUM_ROWS), triton.cdiv(columns, _SUM_COLUMNS))](
            x, ends, ends.shape[0], rows, columns, BLOCK_M=_SUM_ROWS, BLOCK_N=_SUM_COLUMNS
        )


def block_of_groups(num_groups: int) -> int:
    """The power of two that a vector with one element per group has."""
    return max(16, 1 << (num_groups - 1).bit_length())


def tiles_of_groups(rows: int, num_groups: int, block: int) -> int:
    """Programs that cover any groups of `rows` rows, those of no group included, by tiles of `block` rows."""
    return rows // block + num_groups + 1
