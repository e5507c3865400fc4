"""Groups: where each expert's rows lie in a matrix of tokens that is sorted by expert.

A mixture-of-experts layer has a matrix of M rows and int32 `offsets` [E], the row after the last of each group, as in
`torch._grouped_mm`: group e is rows `offsets[e - 1] : offsets[e]`, group 0 starts at row 0, rows from `offsets[-1]` on
belong to no group.

A product that contracts the rows of each group reads transposed matrices, in which hardware wants every group to start
at a multiple of some number of columns, and to have columns: CUTLASS' grouped kernels, which torch calls, stop at a
group without any. So each group is padded to a positive multiple of `align`. How many columns that takes at most,
`GroupLayout.padded_rows`, follows from the number of groups, so nothing waits for a GPU to say what the offsets are.

On CPU, offsets out of order raise. On a GPU nobody looks at them before the kernels do, so `group_layout` makes them
safe there: a group that ends before it starts is empty, and none ends after the last row.
"""

from typing import NamedTuple

import torch

from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

LIBRARY.define("group_layout(Tensor offsets, int rows, int align) -> (Tensor ends, Tensor padded_ends)")
LIBRARY.define("group_sum(Tensor x, Tensor ends) -> Tensor")


class GroupLayout(NamedTuple):
    """Where groups of rows lie, and where they lie padded.

    Attributes:
        ends: int32 [E], the row after the last of each group; in order, at most `rows`.
        padded_ends: int32 [E], the same when every group has `align` rows or a larger multiple of it.
        rows: M, of the matrix that has the groups.
        align: at least 1.
    """

    ends: torch.Tensor
    padded_ends: torch.Tensor
    rows: int
    align: int

    @property
    def padded_rows(self) -> int:
        """What any groups of together at most `rows` rows fit padded: at most M + E * align, a multiple of `align`."""
        return padded_rows(self.rows, self.ends.shape[0], self.align)


def group_layout(offsets: torch.Tensor, rows: int, align: int) -> GroupLayout:
    """The layout of groups with these end offsets.

    Args:
        offsets: int32 [E].
        rows: M, of the matrix that has the groups.
        align: rows that a padded group has a multiple of.

    Raises:
        ValueError: on CPU, a group ends before it starts or after the last row.
    """
    ends, padded_ends = torch.ops.aotrain.group_layout(offsets, rows, align)
    return GroupLayout(ends, padded_ends, rows, align)


def padded_rows(rows: int, num_groups: int, align: int) -> int:
    """`GroupLayout.padded_rows`, for implementations of ops, which see tensors and numbers only."""
    return rows // align * align + num_groups * align


def group_sum(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sum of the rows of each group: [E, N] from x [M, N], accumulated in float32 and rounded once to x's dtype."""
    return torch.ops.aotrain.group_sum(x, ends)


def group_bounds(ends: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each group; reads the offsets, so a GPU is waited for.

    Raises:
        ValueError: a group ends before it starts or after the last row.
    """
    values = ends.tolist()
    starts = [0, *values][: len(values)]
    for group, (start, end) in enumerate(zip(starts, values, strict=True)):
        if not start <= end <= rows:
            wrong = f"it starts at row {start}" if end < start else f"there are {rows} rows"
            raise ValueError(
                f"offsets of grouped rows: group {group} ends at row {end} but {wrong}; want end offsets in order and "
                "at most the number of rows: torch.cumsum of the group sizes, as int32."
            )
    return list(zip(starts, values, strict=True))


def row_groups(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """The group of each row, int64 [rows]; E for rows that belong to none. Waits for nothing."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


def _group_layout(offsets: torch.Tensor, rows: int, align: int) -> tuple[torch.Tensor, torch.Tensor]:
    if offsets.numel() == 0:
        return offsets.clone(), offsets.clone()
    ends = offsets.clamp(0, rows).cummax(0).values
    sizes = ends.diff(prepend=ends.new_zeros(1)).clamp(min=1)
    return ends, ((sizes + (align - 1)) // align * align).cumsum(0, dtype=torch.int32)


def _cpu_group_layout(offsets: torch.Tensor, rows: int, align: int) -> tuple[torch.Tensor, torch.Tensor]:
    group_bounds(offsets, rows)
    return _group_layout(offsets, rows, align)


def _cuda_group_layout(offsets: torch.Tensor, rows: int, align: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel in place of nine. Tests call it with CPU tensors under Triton's interpreter."""
    if offsets.numel() == 0 or triton_problem(offsets.device, MIN_CAPABILITY) is not None:
        return _group_layout(offsets, rows, align)
    from aotrain.kernels.triton.groups import group_layout

    return group_layout(offsets, rows, align)


def _group_sum(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    sums = x.new_zeros((ends.shape[0], x.shape[1]))
    for group, (start, end) in enumerate(group_bounds(ends, x.shape[0])):
        if end > start:
            sums[group] = x[start:end].sum(0)
    return sums


def _cuda_group_sum(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The kernel that waits for nothing. Tests call it with CPU tensors under Triton's interpreter."""
    if x.numel() == 0 or ends.numel() == 0:
        return x.new_zeros((ends.shape[0], x.shape[1]))
    reason = triton_problem(x.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("group_sum", reason)
        return _group_sum(x, ends)
    from aotrain.kernels.triton.groups import group_sum

    return group_sum(x, ends)


LIBRARY.impl("group_layout", _group_layout, "CompositeExplicitAutograd")
LIBRARY.impl("group_layout", _cpu_group_layout, "CPU")
LIBRARY.impl("group_layout", _cuda_group_layout, "CUDA")
torch.library.register_fake(
    "aotrain::group_layout",
    lambda offsets, rows, align: (torch.empty_like(offsets), torch.empty_like(offsets)),
    lib=LIBRARY,
)
LIBRARY.impl("group_sum", _group_sum, "CompositeExplicitAutograd")
LIBRARY.impl("group_sum", _cuda_group_sum, "CUDA")
torch.library.register_fake("aotrain::group_sum", lambda x, ends: x.new_empty((ends.shape[0], x.shape[1])), lib=LIBRARY)
