"""One Adam(W) step in plain torch: the reference that every faster implementation must reproduce.

All arithmetic is float32, one rounding per operation, in the order written here. Scalars that depend only on the step
(bias corrections, 1 - beta, the decay factor) are computed on the host in float64 and rounded once.
"""

import math
from collections.abc import Sequence

import torch

from aotrain.kernels.adam import AdamScalars


def adam_scalars(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, step: int
) -> AdamScalars:
    """Scalars of step number `step` (1 for the first).

    Args:
        decoupled: AdamW's weight decay, applied to the parameter, instead of Adam's, added to the gradient.
    """
    beta1, beta2 = betas
    return AdamScalars(
        one_minus_beta1=1.0 - beta1,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        decay_factor=1.0 - lr * weight_decay if decoupled else 1.0,
        coupled_decay=0.0 if decoupled else weight_decay,
        step_size=lr / (1.0 - beta1**step),
        inv_sqrt_bias_correction2=1.0 / math.sqrt(1.0 - beta2**step),
    )


def adam_update(
    param: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor], scalars: AdamScalars
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """New parameter and moments; nothing is modified.

        p, g        = p * decay_factor, g + coupled_decay * p
        exp_avg     = exp_avg    + (g     - exp_avg)    * (1 - beta1)
        exp_avg_sq  = exp_avg_sq + (g * g - exp_avg_sq) * (1 - beta2)
        p           = p - step_size * exp_avg / (sqrt(exp_avg_sq) * inv_sqrt_bias_correction2 + eps)

    with max(max_exp_avg_sq, exp_avg_sq) under the root for amsgrad. The update uses the moments before they are
    quantized again.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.

    Args:
        param: float32.
        grad: float32, of the same shape.
        moments: (exp_avg, exp_avg_sq), and max_exp_avg_sq for amsgrad; float32, of the same shape.
        scalars: of this step.

    Returns:
        The new parameter and the new moments, float32.
    """
    if scalars.coupled_decay != 0.0:
        grad = grad + param * scalars.coupled_decay
    param = param * scalars.decay_factor
    exp_avg, exp_avg_sq, *maximum = moments
    exp_avg = exp_avg + (grad - exp_avg) * scalars.one_minus_beta1
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * scalars.one_minus_beta2
    maximum = [torch.maximum(previous, exp_avg_sq) for previous in maximum]
    under_root = maximum[0] if maximum else exp_avg_sq
    # Through float64: torch's float32 square root on CPU is not correctly rounded, a kernel's is.
    root = under_root.double().sqrt().float()
    denominator = root * scalars.inv_sqrt_bias_correction2 + scalars.eps
    param = param - exp_avg / denominator * scalars.step_size
    return param, (exp_avg, exp_avg_sq, *maximum)
