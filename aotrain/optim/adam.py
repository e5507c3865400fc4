"""Adam and AdamW with low-bit moments, drop-ins for `torch.optim.Adam` and `torch.optim.AdamW`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch

from aotrain.kernels.adam import AdamScalars
from aotrain.optim.base import LowBitOptimizer, ParamStep
from aotrain.optim.bitsandbytes_arguments import BitsandbytesArguments, check_bitsandbytes_arguments
from aotrain.optim.fused import FusedAdamSteps
from aotrain.optim.sharding import local_of
from aotrain.optim.state import adam_moment_names
from aotrain.optim.step import adam_scalars, adam_update


class _LowBitAdam(LowBitOptimizer):
    """Adam over any state format; subclasses choose the format and the kind of weight decay.

    Args:
        params: parameters, named parameters or parameter groups; extra keys in groups are kept and ignored.
        lr: learning rate, a float or a tensor; schedulers and plain assignment both work.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: added to the gradient (Adam, default 0) or applied to the parameter (AdamW, default 0.01).
        amsgrad: keep the maximum of the second moment as a third state.
        block_size, bf16_stochastic_round, seed, bits, maximize: see `LowBitOptimizer`.
        foreach, fused, capturable: accepted for compatibility and ignored: there is one implementation per device.
        **bitsandbytes: what bitsandbytes' classes take, where it asks for what is done here.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    decoupled_weight_decay: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        bits: int | str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        **bitsandbytes: Unpack[BitsandbytesArguments],
    ) -> None:
        check_bitsandbytes_arguments(type(self).__name__, self.state_bits if bits is None else bits, bitsandbytes)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad},
            block_size=block_size,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
            bits=bits,
            maximize=maximize,
        )

    def moment_names(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq."""
        return adam_moment_names(group["amsgrad"])

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        moments: Sequence[torch.Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """`aotrain.optim.step.adam_update` with the scalars of this step."""
        return adam_update(local_of(param).float(), grad, moments, self._scalars(group, step))

    def _scalars(self, group: Mapping[str, Any], step: int) -> AdamScalars:
        return adam_scalars(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self.decoupled_weight_decay,
            step=step,
        )

    def _step_fused(self, steps: list[ParamStep]) -> list[ParamStep]:
        # Not set in __init__: copies and unpickled optimizers have only groups and state.
        if "_fused_steps" not in self.__dict__:
            self._fused_steps = FusedAdamSteps(self._scalars)
        return self._fused_steps(steps)


class _LowBitAdamW(_LowBitAdam):
    __doc__ = _LowBitAdam.__doc__
    decoupled_weight_decay = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class Adam8bit(_LowBitAdam):
    """Adam with both moments in 8 bits; arguments as `AdamW8bit`, but weight decay is added to the gradient."""

    state_bits = 8


class Adam4bit(_LowBitAdam):
    """Adam with both moments in 4 bits; arguments as `AdamW8bit`, but weight decay is added to the gradient."""

    state_bits = 4


class AdamFp8(_LowBitAdam):
    """Adam with both moments in float8 e4m3; arguments as `AdamW8bit`, but weight decay is added to the gradient."""

    state_bits = "fp8"


class Adam32bit(_LowBitAdam):
    """Adam with float32 moments for parameters of any dtype, with stochastic rounding of bfloat16 parameters."""

    state_bits = 32


class AdamW8bit(_LowBitAdamW):
    """AdamW with both moments in 8 bits: 2.03 bytes of state per parameter instead of 8.

    Moments of matrices are stored as 8-bit dynamic codes with one float32 scale per block along a row; small and
    one-dimensional parameters keep float32 moments (`aotrain.optim.state`). All state is plain tensors (DTensors for
    sharded parameters), so it saves, reshards and loads like any other tensor.

    Arguments are those of `torch.optim.AdamW`, and `block_size`, `bf16_stochastic_round`, `seed`, `bits`; see the base
    class.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022.
    """

    state_bits = 8


class AdamW4bit(_LowBitAdamW):
    """AdamW with both moments in 4 bits: 1.06 bytes of state per parameter. Arguments as `AdamW8bit`.

    Source: Li et al., "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023.
    """

    state_bits = 4


class AdamWFp8(_LowBitAdamW):
    """AdamW with both moments in float8 e4m3: 2.03 bytes of state per parameter. Arguments as `AdamW8bit`."""

    state_bits = "fp8"


class AdamW32bit(_LowBitAdamW):
    """AdamW with float32 moments for parameters of any dtype, with stochastic rounding of bfloat16 parameters."""

    state_bits = 32
