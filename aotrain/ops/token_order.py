"""The k rows of a token: one token to the rows of its experts, and the rows' outputs back into one.

    expand    row[i] = x[tokens[i]]                                   rows sorted by expert, ties in token order
    combine   out[t] = sum over j of weights[t, j] * y[slots[t, j]]   float32, j = 0, 1, ..., rounded once

Both directions are gathers: the gradient of expand is a combine with weights of 1, that of combine an expand times the
weights. Nothing is added in an order that depends on scheduling.
"""

from typing import Any, NamedTuple, cast

import torch

from aotrain.kernels import gather_rows, sum_rows


class TokenOrder(NamedTuple):
    """Which token each row belongs to, and which rows each token has.

    Attributes:
        tokens: int32 [tokens * top_k], the token of each row.
        slots: int32 [tokens, top_k], the row of each choice of each token.
    """

    tokens: torch.Tensor
    slots: torch.Tensor


def sort_by_expert(expert_ids: torch.Tensor) -> TokenOrder:
    """Order of the rows of tokens sorted by expert; equal experts keep the order of tokens.

    Args:
        expert_ids: int [tokens, top_k], the experts that each token chose.
    """
    top_k = expert_ids.shape[1]
    order = torch.argsort(expert_ids.flatten(), stable=True)
    slots = torch.empty_like(order, dtype=torch.int32)
    slots[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return TokenOrder((order // max(top_k, 1)).int(), slots.view(expert_ids.shape))


def expand_rows(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """x [tokens, K] as rows [tokens * top_k, K]. Differentiable in x."""
    return cast(torch.Tensor, _ExpandRows.apply(x, order.tokens, order.slots))


def combine_rows(y: torch.Tensor, weights: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """The weighted sum of each token's rows. Differentiable in y and weights.

    Args:
        y: [tokens * top_k, N], float32, bfloat16 or float16.
        weights: [tokens, top_k], any of these dtypes.
        order: of the rows.

    Returns:
        [tokens, N] in y's dtype.
    """
    if weights.shape != order.slots.shape or y.shape[0] != order.tokens.shape[0]:
        raise ValueError(
            f"combining rows got y of shape {tuple(y.shape)} and weights of shape {tuple(weights.shape)}; want "
            f"{order.tokens.shape[0]} rows and weights {tuple(order.slots.shape)}."
        )
    return cast(torch.Tensor, _CombineRows.apply(y, weights, order.tokens, order.slots))


class _ExpandRows(torch.autograd.Function):
    """Saves the slots, 4 bytes per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return gather_rows(x, tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return sum_rows(grad_outputs[0], ctx.saved_tensors[0]), None, None


class _CombineRows(torch.autograd.Function):
    """Saves y, the weights and the order; y only where the weights need a gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, tokens, slots)
        return sum_rows(y, slots, weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        y, weights, tokens, slots = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.empty(tokens.shape, dtype=torch.float32, device=grad.device)
            of_rows[slots.flatten().long()] = weights.flatten().float()
            grad_y = (gather_rows(grad, tokens).float() * of_rows.unsqueeze(1)).to(grad.dtype)
        if y is not None:
            wide = grad.float()
            choices = slots.t().contiguous()
            columns = [(gather_rows(y, choice).float() * wide).sum(1) for choice in choices]
            grad_weights = torch.stack(columns, dim=1).to(weights.dtype) if columns else torch.zeros_like(weights)
        return grad_y, grad_weights, None, None
