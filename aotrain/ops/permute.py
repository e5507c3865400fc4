"""Permuting routed tokens into groups of an expert, with padding and gradients; all sizes known to the host are bounds.

A grouped matrix product wants its rows sorted by expert and often each group a multiple of 16, 32 or 128 rows long.
After an all-to-all they are sorted by source rank first. `permute` sorts and pads in one copy, `unpermute` undoes it:

    unpermute(permute(x)) = x      rows beyond the sum of the counts become zeros
    padding rows are zeros, and what a gradient or an output has in them is dropped

A token that was sent to several experts is several rows, like any others. Rows beyond the last group's end have no
counterpart either: a grouped product leaves them uninitialized, and nothing reads them here.

`permute_and_pad`, `generate_permute_indices`, `pad_token_groups` and `unpad_token_groups` have the signatures of the
functions of the same names in torchao, for code written for those.
"""

from typing import Any, cast

import torch

from aotrain.kernels import RowPermutation, expert_major_permutation, gather_rows


def padded_rows(num_rows: int, num_groups: int, alignment: int, min_group_rows: int = 0) -> int:
    """An upper bound of the sum of `num_groups` groups of `num_rows` rows in all, each padded to the alignment.

    A multiple of the alignment; exact for an alignment of 1 where empty groups take nothing.
    """
    if alignment == 1 and min_group_rows == 0:
        return num_rows
    return -(-(num_rows + num_groups * alignment) // alignment) * alignment


def permute(
    x: torch.Tensor,
    tokens_per_expert_group: torch.Tensor,
    num_local_experts: int,
    num_ranks: int,
    alignment: int = 1,
) -> tuple[torch.Tensor, RowPermutation]:
    """Sort rows by (source rank, local expert) into rows by (local expert, source rank). Differentiable in x.

    Args:
        x: [rows, K], any dtype; rows beyond the sum of the counts are dropped.
        tokens_per_expert_group: int32 or int64 [num_ranks * num_local_experts], rank-major counts.
        num_local_experts: experts of this rank.
        num_ranks: ranks that rows came from.
        alignment: every group is padded with zero rows to a multiple of it; an empty group takes no rows.

    Returns:
        (x_permuted [padded_rows(rows, num_local_experts, alignment), K], permutation). `permutation.offsets` are the
        ends of the groups, for a grouped product.

    Raises:
        ValueError: x is not a matrix, or the counts are not num_ranks * num_local_experts.
    """
    _check_matrix(x)
    groups = (tokens_per_expert_group, num_local_experts, num_ranks, alignment)
    permutation = token_permutation(x.shape[0], *groups)
    return apply_permutation(x, permutation), permutation


def token_permutation(
    num_rows: int,
    tokens_per_expert_group: torch.Tensor,
    num_local_experts: int,
    num_ranks: int,
    alignment: int = 1,
    *,
    min_group_rows: int = 0,
) -> RowPermutation:
    """What `permute` does to `num_rows` rows; an empty group takes `min_group_rows`, 0 or the alignment."""
    _check_groups(tokens_per_expert_group, num_local_experts, num_ranks)
    return expert_major_permutation(
        tokens_per_expert_group,
        num_local_experts,
        num_rows=num_rows,
        num_permuted=padded_rows(num_rows, num_local_experts, alignment, min_group_rows),
        alignment=alignment,
        min_group_rows=min_group_rows,
    )


def unpermute(y: torch.Tensor, permutation: RowPermutation) -> torch.Tensor:
    """The exact inverse of `permute`: rows of y [rows after, K] at their places before, [rows before, K]."""
    return _move_rows(y, permutation.inverse, permutation.indices)


def apply_permutation(x: torch.Tensor, permutation: RowPermutation) -> torch.Tensor:
    """Rows of x [rows before, K] at their places after, zeros in padding. Differentiable in x."""
    return _move_rows(x, permutation.indices, permutation.inverse)


def permute_and_pad(
    x: torch.Tensor, num_tokens_per_expert: torch.Tensor, ep_degree: int, num_local_experts: int, alignment: int
) -> tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`permute` with an empty group taking `alignment` rows, in the form that torchtitan's dispatcher consumes.

    Args:
        x: [rows, K].
        num_tokens_per_expert: int32 or int64 [ep_degree * num_local_experts], rank-major.
        ep_degree: ranks that rows came from.
        num_local_experts: experts of this rank.
        alignment: what every group is padded to.

    Returns:
        (input_shape, x_permuted, permuted_indices, num_tokens_per_expert_padded, group_offsets). input_shape is
        [rows + 1, K]: writing rows to `permuted_indices`, where padding has -1, leaves padding in the extra row.
    """
    _check_matrix(x)
    groups = (num_tokens_per_expert, num_local_experts, ep_degree, alignment)
    permutation = token_permutation(x.shape[0], *groups, min_group_rows=alignment)
    shape = torch.Size((x.shape[0] + 1, x.shape[1]))
    return shape, apply_permutation(x, permutation), permutation.indices, permutation.sizes, permutation.offsets


def unpermute_indexed(y: torch.Tensor, permuted_indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The inverse of `permute_and_pad` from its indices alone: [num_rows, K], padding dropped. Differentiable in y."""
    return _move_rows(y, invert_indices(permuted_indices, num_rows), permuted_indices)


def invert_indices(indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """int32 [num_rows], where each row is found among indices that name every row at most once; -1 if nowhere."""
    inverse = indices.new_full((num_rows + 1,), -1, dtype=torch.int32)
    targets = torch.where(indices < 0, num_rows, indices).long()  # padding falls on the extra entry
    inverse[targets] = torch.arange(len(indices), dtype=torch.int32, device=indices.device)
    return inverse[:-1].clone()


def generate_permute_indices(
    tokens_per_expert_group: torch.Tensor, experts_per_rank: int, num_ranks: int, max_len: int, alignment: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of `permute_and_pad`: (indices int32 [max_len], -1 in padding; sizes int32 [E]; end offsets int32 [E]).

    Computed on the device of the counts, without host synchronization.
    """
    _check_groups(tokens_per_expert_group, experts_per_rank, num_ranks)
    permutation = expert_major_permutation(
        tokens_per_expert_group,
        experts_per_rank,
        num_rows=max_len,
        num_permuted=max_len,
        alignment=alignment,
        min_group_rows=alignment,
    )
    return permutation.indices, permutation.sizes, permutation.offsets


def pad_token_groups(
    x: torch.Tensor, offs: torch.Tensor, alignment_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad each group of rows with zeros to a multiple of the alignment. Differentiable in x.

    Args:
        x: [M, K], rows sorted by group; rows from offs[-1] on belong to none and are dropped.
        offs: int32 or int64 [E], the end of each group; offs[-1] <= M.
        alignment_size: what each group is padded to; an empty group takes no rows.

    Returns:
        (padded [padded_rows(M, E, alignment_size), K], start offsets int32 [E], end offsets int32 [E]); an end offset
        includes the group's padding.
    """
    _check_matrix(x)
    permutation = token_permutation(x.shape[0], _group_sizes(offs), offs.shape[0], 1, alignment_size)
    starts = permutation.offsets - permutation.sizes
    return apply_permutation(x, permutation), starts, permutation.offsets


def unpad_token_groups(
    padded: torch.Tensor,
    original_offs: torch.Tensor,
    padded_start_offs: torch.Tensor,
    num_tokens: int,
    alignment_size: int = 32,
) -> torch.Tensor:
    """The inverse of `pad_token_groups`: [num_tokens, K], zeros from original_offs[-1] on. Differentiable in padded.

    `padded_start_offs` follows from the other arguments and is not read.
    """
    del padded_start_offs
    permutation = expert_major_permutation(
        _group_sizes(original_offs),
        original_offs.shape[0],
        num_rows=num_tokens,
        num_permuted=padded.shape[0],
        alignment=alignment_size,
    )
    return unpermute(padded, permutation)


def _check_matrix(x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"permuting rows got x of shape {tuple(x.shape)}; want [rows, columns].")


def _check_groups(counts: torch.Tensor, num_local_experts: int, num_ranks: int) -> None:
    if counts.dim() != 1 or counts.shape[0] != num_local_experts * num_ranks:
        raise ValueError(
            f"token counts got shape {tuple(counts.shape)}; want [{num_ranks * num_local_experts}] for {num_ranks} "
            f"ranks and {num_local_experts} local experts."
        )


def _group_sizes(offs: torch.Tensor) -> torch.Tensor:
    return torch.diff(offs, prepend=offs.new_zeros(1))


def _move_rows(x: torch.Tensor, indices: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _MoveRows.apply(x, indices, inverse))


class _MoveRows(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse. Saves the two index lists, 4 bytes per row each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, indices: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices, inverse)
        return gather_rows(x, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        indices, inverse = ctx.saved_tensors
        return _move_rows(grad_outputs[0], inverse, indices), None, None
