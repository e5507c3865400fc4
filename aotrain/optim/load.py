"""Loading optimizer state: every tensor is checked before the first is assigned, and dtypes are kept.

`torch.optim.Optimizer.load_state_dict` casts state to the parameter's dtype, which turns uint8 codes into bfloat16
numbers and rounds float32 scales; only its handling of the parameter groups is used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from aotrain.optim.sharding import is_dtensor, local_of
from aotrain.optim.state import Moment


def load_state(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    moments_of: Callable[[torch.Tensor, Mapping[str, Any]], tuple[Moment, ...]],
    load_groups: Callable[[dict[str, Any]], None],
) -> None:
    """Replace the optimizer's groups and state by those of a state_dict, or raise and change nothing.

    Args:
        optimizer: whose parameters, in group order, the state belongs to.
        state_dict: {"state": {id: {key: tensor}}, "param_groups": [...]}.
        moments_of: (parameter, group) -> how its moments are stored.
        load_groups: `Optimizer.load_state_dict` of the base class.

    Raises:
        ValueError: different parameters, state that this optimizer would not have created for a parameter, or state
            that is not finite.
    """
    saved_groups = state_dict["param_groups"]
    saved_ids = [index for group in saved_groups for index in group["params"]]
    options = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    if len(saved_ids) != len(options):
        raise ValueError(
            f"The optimizer state has {len(saved_ids)} parameters, this optimizer has {len(options)}; it belongs to "
            "another model or another set of trainable parameters."
        )
    saved_options = [group for group in saved_groups for _ in group["params"]]
    loaded: dict[torch.Tensor, dict[str, Any]] = {}
    for index, (param, group), saved_group in zip(saved_ids, options, saved_options, strict=True):
        label = _label(group, param, index)
        if saved_group.get("bits", group["bits"]) != group["bits"]:
            raise ValueError(
                f"Optimizer state of {label} has bits={saved_group['bits']!r}, this optimizer has bits="
                f"{group['bits']!r}; convert it with aotrain.optim.convert_state, or use the optimizer that wrote it."
            )
        if index in state_dict["state"]:
            # The saved options say how the saved state is laid out; they replace the current ones.
            moments = moments_of(param, group | saved_group)
            loaded[param] = _checked(label, param, moments, state_dict["state"][index])
    load_groups({**state_dict, "state": {}})
    optimizer.state.update(loaded)


def _checked(
    label: str, param: torch.Tensor, moments: Sequence[Moment], saved: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    want = {"step"} | {key for moment in moments for key in moment.keys}
    if set(saved) != want:
        raise ValueError(
            f"Optimizer state of {label} has keys {sorted(saved)}, want {sorted(want)}; it was written by another "
            "optimizer (aotrain.optim.convert_state converts it) or for a parameter of another shape."
        )
    expected = {key: value for moment in moments for key, value in moment.init(param).items()}
    result = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).cpu().clone()}
    for key, like in expected.items():
        value = saved[key]
        if value.shape != like.shape or value.dtype != like.dtype or is_dtensor(value) != is_dtensor(like):
            raise ValueError(
                f"Optimizer state {key} of {label} is {_describe(value)}, want {_describe(like)}; "
                "it was saved with another block_size, for another model, or without its sharding "
                "(use torch.distributed.checkpoint.state_dict to move state between sharded and full)."
            )
        result[key] = value.detach().to(like.device, copy=True)
    check_finite(label, result)
    return result


def check_finite(label: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming the first scale, moment or step count of this rank that is NaN or infinite."""
    for key, value in state.items():
        local = local_of(value)
        if local.is_floating_point() and not bool(local.isfinite().all()):
            count = int((~local.isfinite()).sum())
            raise ValueError(
                f"Optimizer state {key} of {label} has {count} NaN or infinite values of {local.numel()}: the run had "
                "diverged when it was saved, or the file is damaged. Load an earlier checkpoint, or start with fresh "
                "optimizer state."
            )


def _label(group: dict[str, Any], param: torch.Tensor, index: Any) -> str:
    names = group.get("param_names")
    if names:
        position = next(i for i, candidate in enumerate(group["params"]) if candidate is param)
        return f"parameter {names[position]!r}"
    return f"parameter {index} of shape {tuple(param.shape)}"


def _describe(tensor: torch.Tensor) -> str:
    kind = "DTensor" if is_dtensor(tensor) else "tensor"
    return f"a {kind} of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
