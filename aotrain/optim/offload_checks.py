"""What `CPUOffloadOptimizer` refuses, and how it says so."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aotrain.optim.sharding import is_dtensor

# Options that say how an update is computed, not what it is.
IMPLEMENTATION_FLAGS = frozenset({"fused", "foreach", "capturable", "differentiable"})
# State that has the parameter's shape in every optimizer that uses these names.
_ELEMENTWISE = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "exp_inf", "sum"})


def check_optimizer_class(optimizer_class: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless this class can be stepped on the CPU and takes these options."""
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise TypeError(
            f"optimizer_class is {optimizer_class!r}, want a subclass of torch.optim.Optimizer, for example "
            "torch.optim.AdamW; options go into keyword arguments."
        )
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_class.__name__} evaluates the loss several times per step, want an optimizer that steps "
            "without a closure and treats each parameter on its own."
        )
    accepted = _accepted(optimizer_class)
    unknown = [name for name in options if accepted is not None and name not in accepted]
    if accepted is not None and unknown:
        raise TypeError(
            f"{optimizer_class.__name__} does not take {', '.join(unknown)}; CPUOffloadOptimizer takes "
            "offload_gradients, minimal_size, max_grad_norm, staging_bytes, and passes on "
            f"{', '.join(sorted(accepted))}."
        )


def check_arguments(minimal_size: int, max_grad_norm: float | None, staging_bytes: int) -> None:
    """Raise ValueError naming the first argument out of range."""
    if minimal_size < 0:
        raise ValueError(f"Invalid minimal_size: {minimal_size}; want >= 0, for example 4096 (0 offloads everything).")
    if staging_bytes < 1:
        raise ValueError(f"Invalid staging_bytes: {staging_bytes}; want >= 1, for example 268435456.")
    if max_grad_norm is not None:
        check_max_norm(max_grad_norm, 2.0)


def check_max_norm(max_norm: float, norm_type: float) -> None:
    """Raise ValueError unless both are positive numbers."""
    if not max_norm > 0.0:
        raise ValueError(f"Invalid max_grad_norm: {max_norm}; want > 0, or None for no clipping.")
    if not norm_type > 0.0:
        raise ValueError(f"Invalid norm_type: {norm_type}; want > 0, for example 2.0 or {math.inf}.")


def check_state(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], inner: torch.optim.Optimizer
) -> None:
    """Raise ValueError unless the state can be of these parameters; nothing has been modified then."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"The optimizer state has keys {sorted(state_dict)}, want 'state' and 'param_groups'; save it with "
            "CPUOffloadOptimizer.state_dict() or with that of the optimizer that is offloaded."
        )
    got = [len(group["params"]) for group in state_dict["param_groups"]]
    want = [len(group["params"]) for group in groups]
    if got != want:
        raise ValueError(
            f"The optimizer state has groups of {got} parameters, this optimizer has {want}; it belongs to another "
            "model, another set of trainable parameters or other parameter groups."
        )
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in inner.param_groups for param in group["params"]]
    for index, param in zip(ids, params, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if key in _ELEMENTWISE and isinstance(value, torch.Tensor):
                _check_tensor(index, key, value, param)


def _check_tensor(index: Any, key: str, value: torch.Tensor, param: torch.Tensor) -> None:
    if value.shape != param.shape or is_dtensor(value) != is_dtensor(param):
        kinds = ["DTensor" if is_dtensor(tensor) else "tensor" for tensor in (value, param)]
        raise ValueError(
            f"Optimizer state {key} of parameter {index} is a {kinds[0]} of shape {tuple(value.shape)}, want a "
            f"{kinds[1]} of shape {tuple(param.shape)}; it was saved for another model or without its sharding (use "
            "torch.distributed.checkpoint.state_dict to move state between sharded and full)."
        )


def _accepted(optimizer_class: type) -> set[str] | None:
    """Names of the options of a class, through those that pass on **kwargs; None if any name may be taken."""
    accepted: set[str] = set()
    for base in optimizer_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        accepted |= {parameter.name for parameter in parameters if parameter.kind in named}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return accepted - {"self", "params"}
        if base is torch.optim.Optimizer:
            break
    return None
