"""What the grouped layers of all formats have in common: checking their arguments, and the bias."""

import torch

from aotrain.kernels.groups import GroupLayout, group_sum, row_groups


def check_grouped(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError or TypeError for operands of `scaled_grouped_mm` that do not go together."""
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"scaled_grouped_mm got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}; want x "
            "[M, K] and weight [E, K, N], for an [E, N, K] parameter its transposed view `weight.mT`."
        )
    if offsets.dtype != torch.int32:
        raise TypeError(f"scaled_grouped_mm got offsets of {offsets.dtype}; want int32: offsets.to(torch.int32).")
    if tuple(offsets.shape) != (weight.shape[0],) or offsets.device != x.device:
        raise ValueError(
            f"scaled_grouped_mm got offsets of shape {tuple(offsets.shape)} on {offsets.device}; want the end offset "
            f"of each of the {weight.shape[0]} groups, on {x.device}."
        )
    if bias is not None and tuple(bias.shape) not in ((weight.shape[2],), (weight.shape[0], weight.shape[2])):
        raise ValueError(
            f"scaled_grouped_mm got bias of shape {tuple(bias.shape)}; want ({weight.shape[2]},), or "
            f"({weight.shape[0]}, {weight.shape[2]}) for one per group."
        )


def bias_of_rows(bias: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """[M, N]: the bias of each row's group, zeros for rows that belong to none.

    Args:
        bias: [N], or [E, N] for one per group.
        layout: of the groups.
    """
    table = bias.expand(layout.ends.shape[0], bias.shape[-1])
    return torch.cat([table, table.new_zeros(1, table.shape[1])]).index_select(0, row_groups(layout.ends, layout.rows))


def bias_gradient(grad: torch.Tensor, ends: torch.Tensor, per_group: bool, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of `bias_of_rows`' bias, [E, N] or [N], from that of the output [M, N]."""
    sums = group_sum(grad, ends if per_group else ends[-1:]).to(dtype)
    return sums if per_group else sums.sum(0)  # of no group: zeros
