"""Groups: where each expert's rows lie in a matrix of tokens that is sorted by expert.

A mixture-of-experts layer has a matrix of M rows and int32 `offsets` [E], the row after the last of each group, as in
`torch._grouped_mm`: group e is rows `offsets[e - 1] : offsets[e]`, group 0 starts at row 0, rows from `offsets[-1]` on
belong to no group.

A product that contracts the rows of each group reads the transposed matrix, whose groups hardware wants to start at
multiples of some number of columns. `padded_offsets` are the end offsets with every group's size rounded up to
such a multiple. The columns of a padded matrix, `padded_size`, are known without knowing the offsets, so nothing waits
for a GPU.

On CPU, offsets out of order raise. On a GPU nobody looks at them before the kernels do, which take a group that ends
before it starts for an empty one and an end past the last row for the last row.
"""

import torch

from aotrain.kernels._library import LIBRARY

LIBRARY.define("padded_offsets(Tensor offsets, int rows, int align) -> Tensor")
LIBRARY.define("group_sum(Tensor x, Tensor offsets) -> Tensor")


def padded_offsets(offsets: torch.Tensor, rows: int, align: int) -> torch.Tensor:
    """End offsets of the groups when each one's size is rounded up to a multiple of `align`.

    Args:
        offsets: int32 [E], end offsets.
        rows: M, of the matrix that has the groups.
        align: at least 1.

    Returns:
        int32 [E]; the last one is at most `padded_size(rows, E, align)`.
    """
    return torch.ops.aotrain.padded_offsets(offsets, rows, align)


def padded_size(rows: int, num_groups: int, align: int) -> int:
    """What any `num_groups` groups of at most `rows` rows together fit, each padded to a multiple of `align`."""
    return (rows + num_groups * (align - 1)) // align * align


def group_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sum of the rows of each group: [E, N] in x's dtype from x [M, N], accumulated in float32."""
    return torch.ops.aotrain.group_sum(x, offsets)


def group_bounds(offsets: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each group; reads the offsets, so a GPU is waited for.

    Raises:
        ValueError: a group ends before it starts or after the last row.
    """
    ends = offsets.tolist()
    starts = [0, *ends][: len(ends)]
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not start <= end <= rows:
            wrong = f"it starts at row {start}" if end < start else f"there are {rows} rows"
            raise ValueError(
                f"offsets of grouped rows: group {group} ends at row {end} but {wrong}; want end offsets in order and "
                "at most the number of rows: torch.cumsum of the group sizes, as int32."
            )
    return list(zip(starts, ends, strict=True))


def row_groups(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The group of each row, int64 [rows]; E for rows that belong to none. Waits for nothing."""
    return torch.searchsorted(offsets, torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True)


def _padded_offsets(offsets: torch.Tensor, rows: int, align: int) -> torch.Tensor:
    ends = offsets.clamp(0, rows).cummax(0).values if offsets.numel() else offsets
    sizes = ends.diff(prepend=ends.new_zeros(1))
    return ((sizes + (align - 1)) // align * align).cumsum(0, dtype=torch.int32)


def _group_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    sums = x.new_zeros((offsets.shape[0], x.shape[1]))
    for group, (start, end) in enumerate(group_bounds(offsets, x.shape[0])):
        if end > start:
            sums[group] = x[start:end].sum(0)
    return sums


LIBRARY.impl("padded_offsets", _padded_offsets, "CompositeExplicitAutograd")
torch.library.register_fake(
    "aotrain::padded_offsets", lambda offsets, rows, align: torch.empty_like(offsets), lib=LIBRARY
)
LIBRARY.impl("group_sum", _group_sum, "CompositeExplicitAutograd")
torch.library.register_fake(
    "aotrain::group_sum", lambda x, offsets: x.new_empty((offsets.shape[0], x.shape[1])), lib=LIBRARY
)
