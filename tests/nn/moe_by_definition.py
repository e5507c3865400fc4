"""A mixture-of-experts layer as its definition, with everything that expert parallelism rounds made explicit."""

from typing import Any

import torch
from torch.nn.functional import silu

from aotrain.formats import Scaling, fake_quantize
from aotrain.ops import Payload

COLUMNS, HIDDEN, OUTPUTS = 70, 48, 40

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor]


def random_case(
    num_tokens: int, num_experts: int, top_k: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tokens, Weights]:
    """(x, expert ids, weights of the router), (w1, w2): leaves that require gradients, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, COLUMNS, generator=generator)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, num_experts // 2] = 0.0  # an expert that nobody chooses
    weights, ids = scores.topk(top_k, dim=-1)
    ids[:2] = ids[:2, :1]  # tokens that choose one expert twice
    w1 = torch.randn(num_experts, HIDDEN, COLUMNS, generator=generator) * COLUMNS**-0.5
    w2 = torch.randn(num_experts, OUTPUTS, HIDDEN, generator=generator) * HIDDEN**-0.5
    leaves = [part.to(dtype).requires_grad_() for part in (x, w1, w2)]
    return (leaves[0], ids, weights.requires_grad_()), (leaves[1], leaves[2])


def exact_case(num_tokens: int, num_experts: int) -> tuple[Tokens, Weights]:
    """Small whole numbers, whose sums and products are exact in any order and exact in float8."""
    (x, ids, weights), (w1, w2) = random_case(num_tokens, num_experts)
    with torch.no_grad():
        for part, largest in ((x, 7), (w1, 2), (w2, 1)):
            part.copy_((part * 2).round().clamp(-largest, largest))
        weights.copy_((weights * 4).round() / 4)
    return (x, ids, weights), (w1, w2)


def expert_loop(
    rows: torch.Tensor, offsets: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, *, activation: bool = True
) -> torch.Tensor:
    """Each expert on its rows; zeros behind the last."""
    parts, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        parts.append(run_expert(rows[start:end], w1[expert], w2[expert], activation))
        start = end
    parts.append(rows.new_zeros(rows.shape[0] - start, w2.shape[1]))
    return torch.cat(parts)


def run_expert(rows: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, activation: bool = True) -> torch.Tensor:
    hidden = rows @ w1.t()
    return (silu(hidden) if activation else hidden) @ w2.t()


class Rounded(torch.autograd.Function):
    """Rows that are rounded on their way forward, and gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Scaling | None, backward: Scaling | None) -> torch.Tensor:
        ctx.scaling = backward
        return x.clone() if forward is None else fake_quantize(x, forward)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad if ctx.scaling is None else fake_quantize(grad, ctx.scaling), None, None


def reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    payload: Payload,
    *,
    activation: bool = True,
) -> torch.Tensor:
    """All experts in one process, rows of an expert in the order of tokens."""
    top_k = ids.shape[1]
    sent = Rounded.apply(x.repeat_interleave(top_k, dim=0), payload.dispatch, payload.dispatch_grad)
    outputs, places = [], []
    for expert in range(w1.shape[0]):
        (mine,) = (ids.flatten() == expert).nonzero(as_tuple=True)
        outputs.append(run_expert(sent[mine], w1[expert], w2[expert], activation))
        places.append(mine)
    y = torch.cat(outputs)[torch.argsort(torch.cat(places))]
    y = Rounded.apply(y, payload.combine, payload.combine_grad)
    scaled = y.float().view(-1, top_k, y.shape[1]) * weights.unsqueeze(-1)
    total = scaled[:, 0]
    for choice in range(1, top_k):
        total = total + scaled[:, choice]
    return total.to(y.dtype)
