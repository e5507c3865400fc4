"""Lion8bit: Lion with its momentum in a low-bit format."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch

from aotrain.optim.base import LowBitOptimizer
from aotrain.optim.bitsandbytes_arguments import BitsandbytesArguments, check_bitsandbytes_arguments
from aotrain.optim.sharding import local_of


class Lion8bit(LowBitOptimizer):
    """Lion with 8-bit momentum: 1.02 bytes of state per parameter.

        p = p * (1 - lr * weight_decay) - lr * sign(m * beta1 + g * (1 - beta1))
        m = m + (g - m) * (1 - beta2)

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate; Lion wants 3 to 10 times less than AdamW.
        betas: interpolation of the update's momentum, decay rate of the stored one.
        weight_decay: decoupled weight decay; Lion wants 3 to 10 times more than AdamW.
        block_size, bf16_stochastic_round, seed, bits, maximize: see `LowBitOptimizer`.
        **bitsandbytes: what bitsandbytes' Lion8bit takes, where it asks for what is done here.

    Raises:
        ValueError: a hyper-parameter out of range.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
    """

    state_bits = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        bits: int | str | None = None,
        maximize: bool = False,
        **bitsandbytes: Unpack[BitsandbytesArguments],
    ) -> None:
        check_bitsandbytes_arguments(type(self).__name__, self.state_bits if bits is None else bits, bitsandbytes)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            block_size=block_size,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            bits=bits,
            maximize=maximize,
        )

    def moment_names(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """exp_avg."""
        return {"exp_avg": True}

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        moments: Sequence[torch.Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The two formulas above."""
        (exp_avg,) = moments
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        direction = (exp_avg * beta1 + grad * (1.0 - beta1)).sign()
        updated = local_of(param).float() * (1.0 - lr * group["weight_decay"]) - direction * lr
        return updated, (exp_avg + (grad - exp_avg) * (1.0 - beta2),)
