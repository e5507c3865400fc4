"""Muon8bit: Muon with its momentum in a low-bit format, orthogonalized on the whole matrix under FSDP2 too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from aotrain.optim.base import LowBitOptimizer
from aotrain.optim.sharding import gather_full, local_of, local_part

# Quintic whose iteration drives singular values into [0.7, 1.2]; Jordan et al., "Muon: An optimizer for hidden layers
# in neural networks", 2024.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon8bit(LowBitOptimizer):
    """Muon with 8-bit momentum, for the matrices of hidden layers: 1.02 bytes of state per parameter.

        m = m + (g - m) * (1 - momentum)
        u = orthogonalize(g + (m - g) * momentum)          (m itself without nesterov)
        p = p * (1 - lr * weight_decay) - lr * c * u       c from adjust_lr_fn

    A sharded momentum is gathered for the orthogonalization, which every rank then computes for itself: the iteration
    on a shard would be another algorithm.

    Args:
        params: two-dimensional parameters, named parameters or groups of them. Embeddings, output layers and vectors
            belong to another optimizer.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: decay rate of the momentum.
        nesterov: look one step ahead.
        eps: lower bound of the norm that the matrix is divided by.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: "original" multiplies by sqrt(max(1, rows / columns)); "match_rms_adamw" by
            0.2 * sqrt(max(rows, columns)), so that AdamW's learning rates carry over.
        block_size, bf16_stochastic_round, seed, bits, maximize: see `LowBitOptimizer`.

    Raises:
        ValueError: a parameter that is not a matrix, or a hyper-parameter out of range.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is
    Scalable for LLM Training", arXiv:2502.16982, section 2.2.
    """

    state_bits = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        bits: int | str | None = None,
        maximize: bool = False,
    ) -> None:
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"Invalid adjust_lr_fn: {adjust_lr_fn!r}; want 'original' or 'match_rms_adamw'.")
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(
            params,
            {**options, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn},
            block_size=block_size,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            bits=bits,
            maximize=maximize,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add matrices with options of their own.

        Raises:
            ValueError: a parameter that is not a matrix, or an option out of range; the group is not added.
        """
        super().add_param_group(param_group)
        shapes = [tuple(param.shape) for param in self.param_groups[-1]["params"] if param.ndim != 2]
        if shapes:
            del self.param_groups[-1]
            raise ValueError(
                f"Muon8bit got a parameter of shape {shapes[0]}; want two dimensions. Give vectors, embeddings and the "
                "output layer to another optimizer, for example AdamW8bit."
            )

    def moment_names(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """momentum_buffer."""
        return {"momentum_buffer": True}

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        moments: Sequence[torch.Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The three formulas above."""
        momentum, lr = group["momentum"], float(group["lr"])
        buffer = moments[0] + (grad - moments[0]) * (1.0 - momentum)
        direction = grad + (buffer - grad) * momentum if group["nesterov"] else buffer
        whole = orthogonalize(gather_full(direction, param), steps=group["ns_steps"], eps=group["eps"])
        step_size = lr * _lr_factor(group["adjust_lr_fn"], *param.shape)
        updated = local_of(param).float() * (1.0 - lr * group["weight_decay"]) - local_part(whole, param) * step_size
        return updated, (buffer,)


def orthogonalize(x: torch.Tensor, *, steps: int, eps: float) -> torch.Tensor:
    """Approximate U @ V.T of x = U @ S @ V.T by Newton-Schulz iteration in bfloat16.

    Args:
        x: float32 [rows, columns].
        steps: iterations.
        eps: lower bound of the Frobenius norm.

    Returns:
        float32 [rows, columns] with singular values near 1.
    """
    a, b, c = _NEWTON_SCHULZ
    y = x.bfloat16()
    if x.shape[0] > x.shape[1]:  # the smaller Gram matrix
        y = y.t()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.t()
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.t() if x.shape[0] > x.shape[1] else y).float()


def _lr_factor(name: str, rows: int, columns: int) -> float:
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
