"""GatheredWeight: what a layer sees of its weight while FSDP2 has it gathered in float8 (or int8).

It stands for the whole weight in the dtype of mixed precision, and holds codes and scales in their place; while a graph
is traced, a handle to them (`aotrain.nn.gathered_plane`). The two products of a layer that use the weight may need
different codes, a *plane* each: one scale per row serves `output = x @ w.T`, one scale per column `grad_input = g @ w`.
FSDP2 gathers the plane that is about to be used; a plane that is asked for and not there is gathered when asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from aotrain.formats import ScaledTensor, Scaling, dequantize, is_mx
from aotrain.nn.gathered_plane import GatheredPlane, gathered_codes
from aotrain.ops import cast_weight
from aotrain.recipes import LinearRecipe, transposed_scaling

aten = torch.ops.aten

# Of a GatheredWeight: dtype, device, scaling.
_Context = tuple[torch.dtype, torch.device, Scaling]


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
        ValueError: a product that uses the weight stays in high precision, or is in MX.
    """
    if any(scaling is not None and is_mx(scaling) for scaling in (recipe.output.rhs, recipe.grad_input.rhs)):
        raise ValueError(
            "enable_fsdp_float8_all_gather got an MX recipe, whose weights FSDP2 gathers in high precision; set it to "
            "False."
        )
    if recipe.output.rhs is None or recipe.grad_input.rhs is None:
        raise ValueError(
            f"enable_fsdp_float8_all_gather got output ({recipe.output}) and grad_input ({recipe.grad_input}); want "
            "both quantized, as a product in high precision needs the weight in high precision: quantize both, or set "
            "it to False."
        )
    return Planes(recipe.output.rhs, transposed_scaling(recipe.grad_input.rhs))


class GatheredWeight(torch.Tensor):
    """A whole weight [N, K] as quantized codes. Read-only; its gradient is an ordinary tensor of its dtype.

    `quantized` gives the codes to the layer. Operations that look at the weight, such as a norm, see the dequantized
    values; products and lookups, which would silently compute with them, raise.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]
    # None while a graph is traced, which knows the weight by its handle.
    gathered: GatheredPlane | None
    handle: torch.Tensor
    # Of the values that operations see.
    scaling: Scaling

    @staticmethod
    def __new__(cls, gathered: GatheredPlane, dtype: torch.dtype) -> "GatheredWeight":
        data = gathered.q.data
        return cls._make(gathered.handle, gathered, data.shape, (dtype, data.device, gathered.q.scaling))

    @classmethod
    def _make(
        cls, handle: torch.Tensor, gathered: GatheredPlane | None, shape: torch.Size, context: "_Context"
    ) -> "GatheredWeight":
        dtype, device, scaling = context
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.handle, self.gathered, self.scaling = handle, gathered, scaling
        return self

    def __tensor_flatten__(self) -> tuple[list[str], "_Context"]:
        return ["handle"], (self.dtype, self.device, self.scaling)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: "_Context", outer_size: torch.Size, outer_stride: Any
    ) -> "GatheredWeight":
        return GatheredWeight._make(inner["handle"], None, outer_size, context)

    def _stable_hash_for_caching(self) -> str:
        # For torch's cache of compiled graphs: all that a graph may depend on, so not which weight this is.
        names = self.scaling.element.name, self.scaling.scale.name, self.scaling.block, self.scaling.rounding
        return repr((type(self).__name__, tuple(self.shape), self.dtype, self.device, self.requires_grad, names))

    def quantized(self, scaling: Scaling, *, transposed: bool) -> ScaledTensor:
        """The codes and scales that casting the weight [N, K], or its transposition, would give."""
        if self.gathered is None:
            return gathered_codes(self, scaling, transposed=transposed)
        if not transposed:
            return self.gathered.plane(scaling)
        q = self.gathered.plane(transposed_scaling(scaling))
        return ScaledTensor(q.data.t().contiguous(), q.scale.t().contiguous(), scaling)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredWeight({tuple(self.shape)}, dtype={self.dtype}, {self.scaling})"

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME or (func in _SAME_IF_SHAPE and tuple(args[1]) == tuple(args[0].shape)):
            _, context = args[0].__tensor_flatten__()
            return cls._make(args[0].handle, args[0].gathered, args[0].shape, context)
        if func is torch.ops.aotrain.gathered_codes.default:
            return func(args[0].handle, *args[1:])
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


def traced_cast_weight(
    weight: torch.Tensor, scaling: Scaling, *, transposed: bool, after: torch.Tensor | None = None
) -> ScaledTensor:
    """`aotrain.ops.cast_weight` where a graph is traced, which takes operations but not methods of a GatheredWeight."""
    cast = gathered_codes if isinstance(weight, GatheredWeight) else cast_weight
    return cast(weight, scaling, transposed=transposed, after=after)


_SAME = {aten.detach.default, aten.alias.default}
_COMPUTE = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mv.default, aten.embedding.default}
_SAME_IF_SHAPE = {aten.view.default, aten.as_strided.default}


def _dequantized(weight: GatheredWeight) -> torch.Tensor:
    gathered = weight.gathered
    if gathered is None:
        return dequantize(gathered_codes(weight, weight.scaling, transposed=False), weight.dtype)
    return dequantize(gathered.plane(gathered.q.scaling), weight.dtype)
