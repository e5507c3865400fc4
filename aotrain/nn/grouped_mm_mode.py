"""Interception of grouped GEMMs: calls on a module's own expert weights go to `scaled_grouped_mm`.

Experts modules of every library end in one call, `torch._grouped_mm(x [M, K], weight [E, K, N], offs [E])` or a thin
wrapper of it. `GroupedMMInterception` is a `TorchFunctionMode` around one forward pass of one module. It follows the
module's parameters through whatever the forward does with them first (transpose, cast, `DTensor.to_local`, a slice, an
added low-rank delta): a 3-D tensor computed from a parameter by anything but a grouped GEMM counts as that parameter.
A grouped GEMM with such a weight is computed by the recipe; all other calls pass through.

Traced by torch.compile as well, without graph breaks. There, reading an attribute (`weight.mT`) shows in no function,
so a tensor of unknown origin and a parameter's sizes counts as that parameter. Not seen are calls that do not go
through torch functions, as Triton kernels that a module launches itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from aotrain.ops.scaled_grouped_mm import GroupedMethod, scaled_grouped_mm

# Functions that multiply groups of rows. torch.nn.functional.grouped_mm calls the first one.
_GROUPED_MM: list[Callable[..., Any]] = [
    torch._grouped_mm,
    torch.ops.aten._grouped_mm,
    torch.ops.aten._grouped_mm.default,
]


def find_grouped_mms() -> None:
    """Also intercept, from now on, transformers' own operator, once transformers has registered it.

    It takes it for what torch.compile or the GPU cannot do by torch's, such as float32 weights.
    """
    operator = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if operator is not None and operator not in _GROUPED_MM:
        _GROUPED_MM.extend([operator, operator.default])


class GroupedMMInterception(TorchFunctionMode):
    """Routes grouped GEMMs on given weights to `scaled_grouped_mm` while it is active.

    Args:
        weights: parameters; DTensors and tensors that FSDP2 gathered included.
        recipe: formats of the three products, or another method.
        inputs: what the forward is called with.
        emulate: see `scaled_grouped_mm`.

    Attributes:
        intercepted: calls that were routed.
        passed: grouped GEMMs that were not, because their weight is none of `weights`.
    """

    def __init__(
        self,
        weights: Iterable[torch.Tensor],
        recipe: GroupedMethod,
        *,
        inputs: Iterable[Any] = (),
        emulate: bool = False,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.emulate = emulate
        self.intercepted = 0
        self.passed = 0
        self._followed: list[torch.Tensor] = []
        for weight in weights:
            if weight.dim() < 2:  # a bias or a scale; what it is added to is no weight
                continue
            self._followed.append(weight)
            if hasattr(weight, "_local_tensor"):  # what DTensor.to_local starts from
                self._followed.append(weight._local_tensor)
        self._is_traced = torch.compiler.is_compiling()
        # Of known other origin; looked at where the origin of some tensors is not seen.
        self._foreign: list[torch.Tensor] = []
        if self._is_traced:
            _show_grouped_mm_to_dynamo()
            self._foreign += [tensor for each in inputs for tensor in _three_dimensional(each)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One call of a torch function."""
        kwargs = {} if kwargs is None else kwargs
        if func in _GROUPED_MM:
            x, weight, offsets, bias, out_dtype = _grouped_mm_arguments(*args, **kwargs)
            if x.dim() == 2 and weight.dim() == 3 and offsets is not None and self._is_followed(weight):
                self.intercepted += 1
                return self._scaled(x, weight, offsets, bias, out_dtype)
            self.passed += 1
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if self._comes_from_weights((*args, *kwargs.values())):
            self._followed += _three_dimensional(out)
        elif self._is_traced:
            self._foreign += _three_dimensional(out)
        return out

    def _scaled(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        if hasattr(weight, "device_mesh") or hasattr(x, "device_mesh"):
            raise ValueError(
                "a grouped GEMM of a converted module got a DTensor; want the tensors of this rank: take "
                "x.to_local() and weight.to_local() in its forward, as torchtitan's GroupedExperts do"
            )
        out = scaled_grouped_mm(x, weight, offsets.to(torch.int32), self.recipe, bias=bias, emulate=self.emulate)
        return out if out_dtype is None else out.to(out_dtype)

    def _is_followed(self, tensor: torch.Tensor) -> bool:
        # `is`, not a set of ids: torch.compile understands it.
        if any(tensor is each for each in self._followed):
            return True
        if not self._is_traced or tensor.dim() != 3 or any(tensor is each for each in self._foreign):
            return False
        return any(_are_sizes_of(tensor, each) for each in self._followed)

    def _comes_from_weights(self, arguments: tuple[Any, ...]) -> bool:
        return any(self._is_followed(tensor) for each in arguments for tensor in _tensors(each))


def _are_sizes_of(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the tensor has the weight's sizes, or those of its transposition."""
    return tensor.shape == weight.shape or tensor.shape == weight.shape[:-2] + weight.shape[:-3:-1]


def _tensors(value: Any) -> list[torch.Tensor]:
    """The value itself, or the tensors of a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def _three_dimensional(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(value) if tensor.dim() == 3]


def _grouped_mm_arguments(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any, Any]:
    """x, weight, offsets, bias, out_dtype; the first two have other names in each of the functions."""
    names = ("offs", "bias", "out_dtype")
    named = {name: kwargs[name] for name in names if name in kwargs}
    operands = [*args[:2], *(value for name, value in kwargs.items() if name not in names)]
    named.update(zip(names, args[2:], strict=False))
    return operands[0], operands[1], named.get("offs"), named.get("bias"), named.get("out_dtype")


def _show_grouped_mm_to_dynamo() -> bool:
    """torch.compile hands functions of a list to modes; torch's own has no private names, and this function is one."""
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().add(torch._grouped_mm)
    return True


# Called while torch.compile traces, not in the graph: what torch.compiler.assume_constant_result sets, whose call would
# import the compiler.
_show_grouped_mm_to_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]
