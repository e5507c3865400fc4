"""Experts modules that compute their grouped GEMMs in low precision, by a change of class in place.

`scale_experts` gives a module a subclass of its own class whose forward runs the original one under
`GroupedMMInterception`. The module stays the same object: parameters, buffers, hooks, FSDP2's state and everything that
refers to it are untouched, and `isinstance` with the original class still holds. The subclass is made on the fly, once
per class; copies and pickles go through the original class.

A converted module that trains without a grouped GEMM on its own weights raises, as it would silently train in high
precision: a loop over experts, or another backend.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aotrain.nn.grouped_mm_mode import GroupedMMInterception, find_grouped_mms
from aotrain.ops.scaled_grouped_mm import GroupedMethod
from aotrain.recipes import LinearRecipe

_SCALING = "_aotrain_expert_scaling"
_ORIGINAL = "_aotrain_original_class"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertScaling:
    """How a converted module computes.

    Attributes:
        recipe: formats of the three products of every grouped GEMM, or another method.
        emulate: see `aotrain.ops.scaled_grouped_mm`.
        fqn: name at conversion, for messages.
    """

    recipe: GroupedMethod
    emulate: bool = False
    fqn: str = ""


def expert_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters, wherever they are.

    Those in ParameterLists, ParameterDicts and behind `torch.nn.utils.parametrize` (adapters) included, and the tensors
    that FSDP1 puts in their place for a forward pass.
    """
    weights: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if name == "parametrizations" or isinstance(child, torch.nn.ParameterList | torch.nn.ParameterDict):
            weights |= {f"{name}.{key}": weight for key, weight in child.named_parameters()}
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 reads no __dict__; FSDP1 is not compiled per layer
        return weights
    attributes = module.__dict__.items()
    return weights | {name: value for name, value in attributes if isinstance(value, torch.Tensor)}


def expert_scaling(module: torch.nn.Module) -> ExpertScaling | None:
    """How a converted module computes; None for any other."""
    return module.__dict__.get(_SCALING)


def scale_experts(module: torch.nn.Module, scaling: ExpertScaling) -> None:
    """Convert one module, or change how a converted one computes."""
    if expert_scaling(module) is None:
        module.__class__ = _low_precision_class(type(module))
    module.__dict__[_SCALING] = scaling


def restore_experts(module: torch.nn.Module) -> None:
    """Undo `scale_experts`, also where FSDP2 has put a class of its own over the converted one."""
    module.__class__ = _without_low_precision(type(module))
    del module.__dict__[_SCALING]


@functools.cache
def _low_precision_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    find_grouped_mms()

    @functools.wraps(cls.forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, cls.forward, args, kwargs)

    def extra_repr(self: torch.nn.Module) -> str:
        recipe = self.__dict__[_SCALING].recipe
        described = f"output=({recipe.output})" if isinstance(recipe, LinearRecipe) else str(recipe)
        return ", ".join(filter(None, [cls.extra_repr(self), described]))

    def reduce(self: torch.nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = cls.__reduce_ex__(self, max(protocol, 2))
        return (_empty_experts, (cls,), *state)

    members = {"forward": forward, "extra_repr": extra_repr, "__reduce_ex__": reduce, _ORIGINAL: cls}
    return type(f"LowPrecision{cls.__name__}", (cls,), {"__module__": cls.__module__, **members})


def _run(module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scaling = module.__dict__[_SCALING]
    mode = GroupedMMInterception(
        expert_weights(module).values(), scaling.recipe, inputs=(*args, *kwargs.values()), emulate=scaling.emulate
    )
    with mode:
        out = forward(module, *args, **kwargs)
    if mode.intercepted == 0 and module.training and torch.is_grad_enabled() and not _is_empty(args):
        raise RuntimeError(_nothing_intercepted(module, scaling, mode.passed))
    return out


def _is_empty(args: tuple[Any, ...]) -> bool:
    """Whether there was nothing to compute: no rows were given."""
    return any(isinstance(arg, torch.Tensor) and arg.numel() == 0 for arg in args)


def _nothing_intercepted(module: torch.nn.Module, scaling: ExpertScaling, passed: int) -> str:
    seen = f"{passed} grouped GEMMs on other tensors" if passed else "no grouped GEMM"
    return (
        f"{scaling.fqn or '(root)'} ({type(module).__name__}) is converted to low precision, but its forward called "
        f"{seen}; want torch._grouped_mm or torch.nn.functional.grouped_mm on its own 3-D parameters, or it would "
        "train in high precision unnoticed. A transformers model: model.set_experts_implementation('grouped_mm'). "
        "A module that is no experts layer, or loops over its experts: leave it out with module_filter_fn."
    )


def _empty_experts(cls: type[torch.nn.Module]) -> torch.nn.Module:
    """What copying and unpickling start from."""
    low_precision = _low_precision_class(cls)
    return low_precision.__new__(low_precision)


def _without_low_precision(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    if _ORIGINAL in cls.__dict__:
        return cls.__dict__[_ORIGINAL]
    bases = tuple(_without_low_precision(base) if hasattr(base, _ORIGINAL) else base for base in cls.__bases__)
    own = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)
