"""GatheredWeight: what a layer sees of its weight while FSDP2 has it gathered in float8 (or int8).

It stands for the whole weight in the dtype of mixed precision, and holds codes and scales in their place. The two
products of a layer that use the weight may need different codes, a *plane* each: one scale per row serves
`output = x @ w.T`, one scale per column `grad_input = g @ w`. FSDP2 gathers the plane that is about to be used; a plane
that is asked for and not there is gathered when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from aotrain.formats import ScaledTensor, Scaling, dequantize
from aotrain.recipes import LinearRecipe, transposed_scaling

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Planes:
    """The scalings of the weight as it lies, [N, K], for the two products that use it."""

    output: Scaling
    grad_input: Scaling

    @property
    def distinct(self) -> tuple[Scaling, ...]:
        """Those that have codes of their own."""
        return (self.output,) if self.output == self.grad_input else (self.output, self.grad_input)


def planes_of(recipe: LinearRecipe) -> Planes:
    """The planes of a recipe.

    Raises:
        ValueError: a product that uses the weight stays in high precision.
    """
    if recipe.output.rhs is None or recipe.grad_input.rhs is None:
        raise ValueError(
            f"enable_fsdp_float8_all_gather got output ({recipe.output}) and grad_input ({recipe.grad_input}); want "
            "both quantized, as a product in high precision needs the weight in high precision: quantize both, or set "
            "it to False."
        )
    return Planes(recipe.output.rhs, transposed_scaling(recipe.grad_input.rhs))


@dataclass(slots=True)
class GatheredPlane:
    """What was gathered, shared by all views of one GatheredWeight and replaced at each gather.

    Attributes:
        q: the codes and scales.
        gather: gathers another plane; a collective that all ranks of the mesh must call.
    """

    q: ScaledTensor
    gather: Callable[[Scaling], ScaledTensor]

    def plane(self, scaling: Scaling) -> ScaledTensor:
        """The codes and scales of a plane."""
        if self.q.data.numel() and self.q.data.untyped_storage().size() == 0:
            raise RuntimeError(
                "a weight gathered by FSDP2 was used after FSDP2 had freed it; use it inside the forward or backward "
                "of its module, or call module.unshard() first."
            )
        return self.q if scaling == self.q.scaling else self.gather(scaling)


class GatheredWeight(torch.Tensor):
    """A whole weight [N, K] as quantized codes. Read-only; its gradient is an ordinary tensor of its dtype.

    `quantized` gives the codes to the layer. Operations that look at the weight, such as a norm, see the dequantized
    values; products and lookups, which would silently compute with them, raise.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]
    gathered: GatheredPlane

    @staticmethod
    def __new__(cls, gathered: GatheredPlane, dtype: torch.dtype) -> "GatheredWeight":
        data = gathered.q.data
        self = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)
        self.gathered = gathered
        return self

    def quantized(self, scaling: Scaling, *, transposed: bool) -> ScaledTensor:
        """The codes and scales that casting the weight [N, K], or its transposition, would give."""
        if not transposed:
            return self.gathered.plane(scaling)
        q = self.gathered.plane(transposed_scaling(scaling))
        return ScaledTensor(q.data.t().contiguous(), q.scale.t().contiguous(), scaling)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredWeight({tuple(self.shape)}, dtype={self.dtype}, {self.gathered.q.scaling})"

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME or (func in _SAME_IF_SHAPE and tuple(args[1]) == tuple(args[0].shape)):
            return GatheredWeight(args[0].gathered, args[0].dtype)
        if func in _COMPUTE:
            raise RuntimeError(
                f"{func} got a weight that FSDP2 has gathered in float8 for another layer's use; share (tie) weights "
                "before convert_to_float8_training, which then leaves them in high precision, or set "
                "enable_fsdp_float8_all_gather=False."
            )
        if func._schema.is_mutable and any(isinstance(arg, cls) for arg in args[:1]):
            raise RuntimeError(
                f"{func} would write to a weight that FSDP2 has gathered in float8, which is read-only; change the "
                "sharded parameter instead, outside forward and backward (module.reshard() first)."
            )
        args, kwargs = tree_map_only(cls, _dequantized, (args, kwargs))
        return func(*args, **kwargs)


_SAME = {aten.detach.default, aten.alias.default}
_COMPUTE = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mv.default, aten.embedding.default}
_SAME_IF_SHAPE = {aten.view.default, aten.as_strided.default}


def _dequantized(weight: GatheredWeight) -> torch.Tensor:
    gathered = weight.gathered
    return dequantize(gathered.plane(gathered.q.scaling), weight.dtype)
