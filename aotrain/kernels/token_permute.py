"""Permuting tokens from (source rank, local expert) to (local expert, source rank): indices, and a gather of rows.

With counts c[r, e] of rows from rank r for local expert e, the rows of (r, e) lie

    before   behind all c[r', e'] with (r', e') < (r, e)
    after    behind all groups e' < e, each padded to a multiple of `alignment`, and all c[r', e] with r' < r

Everything is computed on the device from the counts; the host knows only upper bounds of the sizes. A permutation is
kept with its inverse: a gather by either is the other's inverse and its gradient, so one kernel does all, and neither
direction adds, needs atomics or depends on an order.
"""

from typing import NamedTuple

import torch

from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

LIBRARY.define(
    "expert_major_indices(Tensor counts, int num_experts, int alignment, int min_rows, int num_rows, int num_permuted)"
    " -> (Tensor indices, Tensor inverse, Tensor sizes, Tensor offsets)"
)
LIBRARY.define("gather_rows(Tensor x, Tensor indices) -> Tensor")

# Rows are copied as integers of their size: 8-bit formats have no gather of their own.
BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RowPermutation(NamedTuple):
    """Where rows go, and which come from where; -1 for a row that has no counterpart.

    Attributes:
        indices: int32 [rows after], the row before.
        inverse: int32 [rows before], the row after.
        sizes: int32 [experts], rows of each group with its padding.
        offsets: int32 [experts], the end of each group; the last may lie before the last row.
    """

    indices: torch.Tensor
    inverse: torch.Tensor
    sizes: torch.Tensor
    offsets: torch.Tensor


def expert_major_permutation(
    tokens_per_group: torch.Tensor,
    num_local_experts: int,
    *,
    num_rows: int,
    num_permuted: int,
    alignment: int = 1,
    min_group_rows: int = 0,
) -> RowPermutation:
    """The permutation of rows that came from several ranks to groups of the same expert. No host synchronization.

    Args:
        tokens_per_group: int32 or int64 [ranks * num_local_experts], rows of each (source rank, local expert), in the
            order in which they lie.
        num_local_experts: how many experts this rank has.
        num_rows: rows before; those beyond the sum of the counts have no counterpart.
        num_permuted: rows after, at least the sum of the padded groups: rows beyond it would be lost.
        alignment: every group is padded to a multiple of it.
        min_group_rows: what an empty group takes; a multiple of `alignment`.

    Raises:
        TypeError: counts that are not int32 or int64.
        ValueError: the number of counts is not a multiple of `num_local_experts`, or alignment < 1.
    """
    if tokens_per_group.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tokens_per_group got {tokens_per_group.dtype}; want int32 or int64 counts of rows.")
    if tokens_per_group.dim() != 1 or num_local_experts < 1 or tokens_per_group.numel() % num_local_experts:
        raise ValueError(
            f"tokens_per_group got shape {tuple(tokens_per_group.shape)} for {num_local_experts} local experts; "
            "want [ranks * local experts]."
        )
    if alignment < 1 or min_group_rows % alignment:
        raise ValueError(
            f"got alignment {alignment} and {min_group_rows} rows for an empty group; want alignment >= 1 and a "
            "multiple of it."
        )
    arguments = (num_local_experts, alignment, min_group_rows, num_rows, num_permuted)
    return RowPermutation(*torch.ops.aotrain.expert_major_indices(tokens_per_group, *arguments))


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`y[i] = x[indices[i]]`, and a row of zero bits where the index is -1. Copies bits, whatever the dtype.

    Args:
        x: [rows, columns], any dtype of 1 to 8 bytes, any strides; rows that are contiguous are read in place.
        indices: int32 [rows of y], each -1 or a row of x.

    Returns:
        y: [len(indices), columns], contiguous, x's dtype. Not differentiable: `ops.permute` is.
    """
    if x.dim() != 2 or indices.dim() != 1:
        raise ValueError(
            f"gather_rows got x of shape {tuple(x.shape)} and indices of shape {tuple(indices.shape)}; "
            "want [rows, columns] and [rows of the result]."
        )
    if x.stride(-1) != 1:
        x = x.contiguous()
    return torch.ops.aotrain.gather_rows(x.view(BITS_OF_SIZE[x.element_size()]), indices).view(x.dtype)


def _indices_reference(
    counts: torch.Tensor, num_experts: int, alignment: int, min_rows: int, num_rows: int, num_permuted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = counts.long().view(-1, num_experts)  # [ranks, experts]
    sizes = (-(-counts.sum(0) // alignment) * alignment).clamp_min(min_rows)
    offsets = sizes.cumsum(0)
    starts = (offsets - sizes + counts.cumsum(0) - counts).flatten()  # after, of each (rank, expert)
    ends_before = counts.flatten().cumsum(0)
    starts_before = ends_before - counts.flatten()
    rows = torch.arange(num_rows, device=counts.device)
    segment = torch.searchsorted(ends_before, rows, right=True).clamp_max(counts.numel() - 1)
    inverse = starts[segment] + rows - starts_before[segment]
    inverse = torch.where((rows < ends_before[-1]) & (inverse < num_permuted), inverse, -1)
    indices = torch.full((num_permuted + 1,), -1, dtype=torch.int32, device=counts.device)
    indices[inverse] = rows.int()  # rows without a place fall on the extra entry
    return indices[:-1].clone(), inverse.int(), sizes.int(), offsets.int()


def _indices_cuda(
    counts: torch.Tensor, num_experts: int, alignment: int, min_rows: int, num_rows: int, num_permuted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Triton kernel where it runs. Tests call it with CPU tensors under Triton's interpreter."""
    reason = triton_problem(counts.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("expert_major_indices", reason)
        return _indices_reference(counts, num_experts, alignment, min_rows, num_rows, num_permuted)
    from aotrain.kernels.triton.token_permute import expert_major_indices

    return expert_major_indices(counts, num_experts, alignment, min_rows, num_rows, num_permuted)


def _indices_fake(
    counts: torch.Tensor, num_experts: int, alignment: int, min_rows: int, num_rows: int, num_permuted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = (num_permuted, num_rows, num_experts, num_experts)
    indices, inverse, sizes, offsets = (counts.new_empty(length, dtype=torch.int32) for length in lengths)
    return indices, inverse, sizes, offsets


def _gather_reference(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(indices.shape[0], x.shape[1])
    rows = x.index_select(0, indices.clamp_min(0))
    return rows.masked_fill_((indices < 0).unsqueeze(1), 0)


def _gather_cuda(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The Triton kernel where it runs. Tests call it with CPU tensors under Triton's interpreter."""
    reason = triton_problem(x.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("gather_rows", reason)
        return _gather_reference(x, indices)
    from aotrain.kernels.triton.token_permute import gather_rows as kernel

    return kernel(x, indices)


def _gather_fake(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.new_empty(indices.shape[0], x.shape[1])


LIBRARY.impl("expert_major_indices", _indices_reference, "CompositeExplicitAutograd")
LIBRARY.impl("expert_major_indices", _indices_cuda, "CUDA")
torch.library.register_fake("aotrain::expert_major_indices", _indices_fake, lib=LIBRARY)
LIBRARY.impl("gather_rows", _gather_reference, "CompositeExplicitAutograd")
LIBRARY.impl("gather_rows", _gather_cuda, "CUDA")
torch.library.register_fake("aotrain::gather_rows", _gather_fake, lib=LIBRARY)
