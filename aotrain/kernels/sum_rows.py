"""sum_rows: the weighted sum of the rows that belong to each token, in float32 and in a fixed order.

    out[t] = sum over j of weights[t, j] * y[slots[t, j]]        j = 0, 1, ..., each operation rounded to float32

Outputs of experts come together this way, and gradients of tokens that went to several experts (weights of 1). No
atomics: a result does not depend on scheduling.
"""

import torch

from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.token_permute import gather_rows

LIBRARY.define("sum_rows(Tensor y, Tensor slots, Tensor? weights) -> Tensor")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sum_rows(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum rows of y by token. Not differentiable: `ops.token_order.combine_rows` is.

    Args:
        y: [rows, N], float32, bfloat16 or float16.
        slots: int32 [tokens, top_k], rows of y; -1 for none.
        weights: [tokens, top_k], float32, bfloat16 or float16; None for weights of 1.

    Returns:
        [tokens, N] in y's dtype, rounded once; zeros for a token without rows.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes that do not fit.
    """
    if y.dtype not in _DTYPES or (weights is not None and weights.dtype not in _DTYPES):
        got = y.dtype if weights is None else (y.dtype, weights.dtype)
        raise TypeError(f"sum_rows got {got}; want float32, bfloat16 or float16.")
    if y.dim() != 2 or slots.dim() != 2 or (weights is not None and weights.shape != slots.shape):
        raise ValueError(
            f"sum_rows got y of shape {tuple(y.shape)}, slots of shape {tuple(slots.shape)} and weights of shape "
            f"{None if weights is None else tuple(weights.shape)}; want [rows, N] and twice [tokens, top_k]."
        )
    return torch.ops.aotrain.sum_rows(y, slots, weights)


def _reference(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    total = torch.zeros(slots.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    for choice in range(slots.shape[1]):
        rows = gather_rows(y, slots[:, choice].contiguous()).float()
        total += rows if weights is None else rows * weights[:, choice, None].float()
    return total.to(y.dtype)


def _cuda(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The Triton kernel where it runs. Tests call it with CPU tensors under Triton's interpreter."""
    reason = triton_problem(y.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("sum_rows", reason)
        return _reference(y, slots, weights)
    from aotrain.kernels.triton.sum_rows import sum_rows as kernel

    return kernel(y, slots, weights)


def _fake(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


LIBRARY.impl("sum_rows", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("sum_rows", _cuda, "CUDA")
torch.library.register_fake("aotrain::sum_rows", _fake, lib=LIBRARY)
