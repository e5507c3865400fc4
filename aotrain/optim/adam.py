"""Adam and AdamW with low-bit moments, drop-ins for `torch.optim.Adam` and `torch.optim.AdamW`."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch

from aotrain.formats import BFLOAT16, philox_bits16, round_stochastic
from aotrain.optim.load import load_state
from aotrain.optim.sharding import global_index, local_of
from aotrain.optim.state import DEFAULT_BLOCK_SIZE, check_bits, group_moments
from aotrain.optim.step import adam_scalars, adam_update


class _LowBitAdam(torch.optim.Optimizer):
    """Adam over any state format; subclasses choose the format and the kind of weight decay.

    Args:
        params: parameters, named parameters or parameter groups; extra keys in groups are kept and ignored.
        lr: learning rate, a float or a tensor; schedulers and plain assignment both work.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: added to the gradient (Adam, default 0) or applied to the parameter (AdamW, default 0.01).
        amsgrad: keep the maximum of the second moment as a third state.
        block_size: elements per scale; None is 256, and 128 for 4 bits.
        bf16_stochastic_round: round bfloat16 parameters stochastically, so that updates smaller than half a step of
            the format are not lost.
        seed: of the stochastic rounding; saved with the state. The random bits depend on (seed, step, parameter,
            element) only, not on the number of ranks.
        bits: 8, 4, "fp8" or 32, instead of the class's format; also an option of parameter groups.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for compatibility and ignored: there is one implementation per device.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    decoupled_weight_decay: ClassVar[bool] = False
    state_bits: ClassVar[int | str]

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
    ) -> None:
        bits = check_bits(self.state_bits if bits is None else bits)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "block_size": DEFAULT_BLOCK_SIZE[bits] if block_size is None else block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "seed": seed,
            "bits": bits,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option out of range; the group is not added.
        """
        if "bits" in param_group and "block_size" not in param_group:
            param_group["block_size"] = DEFAULT_BLOCK_SIZE[check_bits(param_group["bits"])]
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Configuration files and command lines deliver these as strings and as 0/1.
        group["bits"] = check_bits(group["bits"])
        group["block_size"], group["seed"] = int(group["block_size"]), int(group["seed"])
        for flag in ("amsgrad", "bf16_stochastic_round", "maximize"):
            group[flag] = bool(group[flag])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss, with gradients enabled.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, param.grad, group, position)
                position += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; all of it or, on any mismatch, nothing.

        Raises:
            ValueError: the state is of other parameters, another block size or another optimizer; the message names
                the parameter.
        """
        load_state(self, state_dict, super().load_state_dict)

    def _step_param(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], position: int) -> None:
        if grad.is_sparse:
            raise RuntimeError(
                "Sparse gradient is not supported by low-bit optimizers; build the embedding with sparse=False."
            )
        moments = group_moments(param, group)
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for moment in moments:
                state.update(moment.init(param))
        state["step"] += 1
        step = int(state["step"].item())
        scalars = adam_scalars(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self.decoupled_weight_decay,
            step=step,
        )
        local = local_of(param)
        values = [moment.read(state, local) for moment in moments]
        local_grad = local_of(grad).float()
        if group["maximize"]:
            local_grad = -local_grad
        updated, new_values = adam_update(local.float(), local_grad, values, scalars)
        for moment, value in zip(moments, new_values, strict=True):
            moment.write(state, value)
        if group["bf16_stochastic_round"] and local.dtype == torch.bfloat16:
            updated = _round_to_bfloat16(updated, param, _sr_key(group["seed"], step, position))
        local.copy_(updated)


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


def _check_options(options: dict[str, Any]) -> None:
    lr, eps, weight_decay = float(options["lr"]), options["eps"], options["weight_decay"]
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; want >= 0.")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}; want >= 0.")
    for index, beta in enumerate(options["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; want 0 <= beta < 1.")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; want >= 0.")
    if int(options["block_size"]) < 1:
        raise ValueError(f"Invalid block_size: {options['block_size']}; want at least 1, for example 256.")
    check_bits(options["bits"])


def _round_to_bfloat16(updated: torch.Tensor, param: torch.Tensor, key: int) -> torch.Tensor:
    rounded = round_stochastic(updated, BFLOAT16, philox_bits16(key, global_index(param))).float()
    # round_stochastic saturates; a weight that overflowed must stay visible.
    return torch.where(updated.isfinite(), rounded, updated)


def _sr_key(seed: int, step: int, position: int) -> int:
    """64-bit Philox key of one parameter at one step, decorrelated by splitmix64's finalizer.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    mask = (1 << 64) - 1
    key = seed & mask
    for word in (step, position):
        key = (key + (word + 1) * 0x9E3779B97F4A7C15) & mask
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
        key ^= key >> 31
    return key
