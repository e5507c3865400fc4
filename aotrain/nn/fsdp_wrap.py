"""Putting FsdpWeight into a model, and keeping it out of what others see: state_dicts and unconverted models."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from aotrain.nn.fsdp_weight import FsdpWeight, fsdp_weight_of, refresh_amax
from aotrain.nn.gathered_weight import Planes
from aotrain.nn.shard_amax import Splits

logger = logging.getLogger(__name__)

# A module and the name it has for a parameter.
_Place = tuple[torch.nn.Module, str]


def wrap_weights(model: torch.nn.Module, *, splits: Splits | None = None) -> None:
    """Let FSDP2 gather in low precision the weights of all layers in a model that ask for it by their `fsdp_planes`.

    Call it before `fully_shard`; `convert_to_float8_training` does. A weight shared with a layer that needs other
    codes, or high precision, is gathered in high precision, and a warning says so; `fsdp_planes` of its layers becomes
    None.

    Args:
        model: with plain weights, or split by tensor parallelism.
        splits: of the weights; by default what their placements say, before `fully_shard`.
    """
    places: dict[torch.Tensor, list[_Place]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                places.setdefault(param, []).append((module, name))
    for param, owners in places.items():
        wanted = [_planes_at(place) for place in owners]
        planes, present = next((each for each in wanted if each is not None), None), fsdp_weight_of(param)
        if planes is not None and any(each != planes for each in wanted):
            planes = None
            logger.warning(
                "a weight of shape %s is shared by layers of which some need it in high precision or in other codes; "
                "FSDP2 gathers it in high precision",
                tuple(param.shape),
            )
            for module, _ in owners:
                module.fsdp_planes = None  # pyrefly: ignore[bad-argument-type]
        if planes is None:
            if present is not None:
                _put(param, plain_tensor(param), owners)
        elif present is not None:
            present.planes = planes
        else:
            own = _splits(param, owners[0][0]) if splits is None else splits
            _put(param, _with_local(param, functools.partial(FsdpWeight, planes=planes, splits=own)), owners)


def unwrap_weights(model: torch.nn.Module) -> None:
    """Turn every FsdpWeight of a model back into an ordinary parameter."""
    replaced: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and fsdp_weight_of(param) is not None:
                if param in replaced:
                    module._parameters[name] = replaced[param]  # pyrefly: ignore[unsupported-operation]
                else:
                    replaced[param] = _put(param, plain_tensor(param), [(module, name)])


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without FsdpWeight: an ordinary tensor or DTensor. Others are returned as they are."""
    weight = fsdp_weight_of(tensor)
    return tensor if weight is None else _with_local(tensor, lambda _: weight.plain)


def precompute_float8_dynamic_scale_for_fsdp(module: torch.nn.Module) -> None:
    """Compute the scales of all weights that FSDP2 gathers in low precision, with one all-reduce.

    Nobody has to call it: every step of an optimizer does the same for the weights it updates. It saves one small
    all-reduce per weight after weights were changed by other means, such as loading a checkpoint. Every rank must call
    it. Weights that have not been gathered yet are left to their first gather.
    """
    weights = [weight for param in module.parameters() if (weight := fsdp_weight_of(param)) is not None]
    refresh_amax(weights)


def _planes_at(place: _Place) -> Planes | None:
    module, name = place
    return getattr(module, "fsdp_planes", None) if name == "weight" else None


def _splits(param: torch.Tensor, module: torch.nn.Module) -> Splits:
    """How tensor parallelism has split a weight whose scales are those of the whole."""
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None or getattr(module, "tensor_parallel_scales", "own") == "own":
        return ()
    placements: Any = param.placements  # pyrefly: ignore[missing-attribute]
    return tuple((each.dim, mesh.get_group(number)) for number, each in enumerate(placements) if each.is_shard())


def _with_local(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The tensor, or the DTensor with its local tensor, changed."""
    local = getattr(tensor, "_local_tensor", None)
    if local is None:
        return change(tensor.detach())
    # The constructor that FSDP2 uses: DTensor.from_local would make a view, which is a plain tensor.
    return type(tensor.detach())(change(local.detach()), tensor._spec, requires_grad=False)  # pyrefly: ignore


def _put(old: torch.Tensor, value: torch.Tensor, owners: list[_Place]) -> torch.nn.Parameter:
    new = torch.nn.Parameter(value, old.requires_grad)
    new.grad = old.grad
    for module, name in owners:
        module._parameters[name] = new
    return new
