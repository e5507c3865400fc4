"""What all low-bit optimizers share: options, the loop over parameters, state creation, rounding, loading."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, overload

import torch

from aotrain.formats import BFLOAT16, philox_bits16, round_stochastic
from aotrain.optim.load import load_state
from aotrain.optim.sharding import global_index, is_flattened, local_of
from aotrain.optim.state import DEFAULT_BLOCK_SIZE, Moment, block_moments, check_bits


@dataclass(frozen=True, slots=True)
class ParamStep:
    """One parameter's part of one `step()`.

    Attributes:
        param: the parameter, a DTensor if it is sharded.
        grad: its gradient on this rank, dense, of any floating dtype.
        group: its parameter group.
        state: its state, created if this is the first step.
        moments_of: says how the state is stored.
        number: 1 for the first step of this parameter.
        position: of the parameter among all parameters of the optimizer.
    """

    param: torch.Tensor
    grad: torch.Tensor
    group: dict[str, Any]
    state: dict[str, torch.Tensor]
    moments_of: Callable[[torch.Tensor, Mapping[str, Any]], tuple[Moment, ...]]
    number: int
    position: int

    @property
    def moments(self) -> tuple[Moment, ...]:
        """How the state is stored."""
        return self.moments_of(self.param, self.group)

    @property
    def stochastic(self) -> bool:
        """Whether the new parameter is rounded stochastically."""
        return self.group["bf16_stochastic_round"] and self.param.dtype == torch.bfloat16

    @property
    def rounding_key(self) -> int:
        """64-bit Philox key of this parameter at this step, decorrelated by splitmix64's finalizer.

        Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
        """
        mask = (1 << 64) - 1
        key = self.group["seed"] & mask
        for word in (self.number, self.position):
            key = (key + (word + 1) * 0x9E3779B97F4A7C15) & mask
            key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
            key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
            key ^= key >> 31
        return key


class LowBitOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose moments are stored in a low-bit format; subclasses give the update rule.

    Args:
        params: parameters, named parameters or parameter groups; extra keys in groups are kept and ignored.
        options: of the update rule, as defaults of parameter groups; `lr` and `weight_decay` among them.
        block_size: elements per scale; None is 256, and 128 for 4 bits.
        bf16_stochastic_round: round bfloat16 parameters stochastically, so that updates smaller than half a step of
            the format are not lost.
        seed: of the stochastic rounding; saved with the state. The random bits depend on (seed, step, parameter,
            element) only, not on the number of ranks.
        bits: 8, 4, "fp8" or 32, instead of the class's format; also an option of parameter groups.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    state_bits: ClassVar[int | str]

    def __init__(
        self,
        params: Iterable[Any],
        options: Mapping[str, Any],
        *,
        block_size: int | None,
        bf16_stochastic_round: bool,
        seed: int,
        bits: int | str | None,
        maximize: bool,
    ) -> None:
        bits = check_bits(self.state_bits if bits is None else bits)
        common = {
            "block_size": DEFAULT_BLOCK_SIZE[bits] if block_size is None else block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "seed": seed,
            "bits": bits,
            "maximize": maximize,
        }
        super().__init__(params, {**options, **common})

    @abstractmethod
    def moment_names(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """Name of each moment of a parameter of this group -> whether it can be negative."""

    @abstractmethod
    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        moments: Sequence[torch.Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """New values of a parameter and of its moments, float32 in the local shape; nothing is modified.

        Args:
            param: the parameter, a DTensor if it is sharded.
            grad: this rank's gradient, float32, negated for `maximize`.
            moments: this rank's moments, float32, in the order of `moment_names`.
            group: the parameter's group.
            step: number of this step, 1 for the first.
        """

    def moments(self, param: torch.Tensor, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        """How the moments of a parameter of this group are stored."""
        return block_moments(param, group, self.moment_names(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option out of range; the group is not added.
        """
        if "bits" in param_group and "block_size" not in param_group:
            param_group["block_size"] = DEFAULT_BLOCK_SIZE[check_bits(param_group["bits"])]
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Configuration files and command lines deliver these as strings and as 0/1.
        group["bits"] = check_bits(group["bits"])
        group["block_size"], group["seed"] = int(group["block_size"]), int(group["seed"])
        for flag in {"amsgrad", "nesterov", "bf16_stochastic_round", "maximize"} & group.keys():
            group[flag] = bool(group[flag])
        if group["bits"] != 32 and any(map(is_flattened, group["params"])):
            _warn_flattened(type(self).__name__, group["bits"])

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
        for step in self._step_fused(self._begin_steps()):
            self._step_reference(step)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; all of it or, on any mismatch, nothing.

        Raises:
            ValueError: the state is of other parameters, another block size or another optimizer; the message names
                the parameter.
        """
        load_state(self, state_dict, self.moments, super().load_state_dict)

    def _begin_steps(self) -> list[ParamStep]:
        """Count the step of every parameter that has a gradient, and create its state if it has none."""
        found = []
        position = 0
        for group in self.param_groups:
            for param in group["params"]:
                if (grad := param.grad) is not None:
                    if grad.is_sparse:
                        raise RuntimeError(
                            "Sparse gradient is not supported by low-bit optimizers; build the embedding with "
                            "sparse=False."
                        )
                    found.append((param, local_of(grad), group, position))
                position += 1
        return [self._begin_step(*each) for each in found]

    def _begin_step(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], position: int) -> ParamStep:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for moment in self.moments(param, group):
                state.update(moment.init(param))
        state["step"] += 1
        return ParamStep(param, grad, group, state, self.moments, int(state["step"].item()), position)

    def _step_fused(self, steps: list[ParamStep]) -> list[ParamStep]:
        """Do the steps that a kernel can do; returns the others."""
        return steps

    def _step_reference(self, step: ParamStep) -> None:
        local, group, moments = local_of(step.param), step.group, step.moments
        values = [moment.read(step.state, local) for moment in moments]
        grad = step.grad.float()
        updated, new_values = self.update(step.param, -grad if group["maximize"] else grad, values, group, step.number)
        for moment, value in zip(moments, new_values, strict=True):
            moment.write(step.state, value)
        if step.stochastic:
            updated = _round_to_bfloat16(updated, step.param, step.rounding_key)
        local.copy_(updated)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first option of a parameter group that is out of range."""
    lr, eps, weight_decay = float(options["lr"]), options.get("eps", 0.0), options["weight_decay"]
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; want >= 0.")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}; want >= 0.")
    for index, beta in enumerate(options.get("betas", (options.get("momentum", 0.0),))):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; want 0 <= beta < 1.")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; want >= 0.")
    if int(options["block_size"]) < 1:
        raise ValueError(f"Invalid block_size: {options['block_size']}; want at least 1, for example 256.")
    check_bits(options["bits"])


@cache
def _warn_flattened(optimizer: str, bits: int | str) -> None:
    """Once per process: groups, and optimizers that are built again, would repeat it."""
    warnings.warn(
        f"{optimizer} got parameters flattened by FSDP1 (FullyShardedDataParallel); their state is float32, not "
        f"bits={bits!r}: a piece of a flat buffer has no rows to put blocks on. Use FSDP2 (torch.distributed.fsdp."
        "fully_shard; with Accelerate fsdp_version: 2) for low-bit state, or bits=32 if float32 is what you want.",
        stacklevel=2,
    )


def _round_to_bfloat16(updated: torch.Tensor, param: torch.Tensor, key: int) -> torch.Tensor:
    rounded = round_stochastic(updated, BFLOAT16, philox_bits16(key, global_index(param))).float()
    # round_stochastic saturates; a weight that overflowed must stay visible.
    return torch.where(updated.isfinite(), rounded, updated)
