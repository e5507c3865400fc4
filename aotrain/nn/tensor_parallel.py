"""Tensor-parallel styles for `Float8Linear`, for `torch.distributed.tensor.parallel.parallelize_module`.

They take torch's styles' arguments and go where those go. Operands have the scales of the whole matrix, so a layer
gives what it gives on one rank but for the order in which the ranks' sums are added. With a tensorwise recipe an input
that is gathered, such as one split along the sequence, is gathered as codes, one byte per element; with other recipes
the two products of an input take different codes, and it is gathered in high precision.

Under FSDP2 x TP: convert the model, apply these styles, then `fully_shard`. Weights gathered as codes by FSDP2 keep the
scales of the whole layer.

This module loads torch.distributed.tensor: import it by its name, `aotrain.nn.tensor_parallel`.
"""

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

from aotrain.formats import TENSORWISE, Scaling
from aotrain.nn.float8_linear import Float8Linear
from aotrain.nn.fsdp_wrap import unwrap_weights, wrap_weights
from aotrain.nn.sharded_linear import carry_codes, gather_as_codes
from aotrain.recipes import LinearRecipe

__all__ = ["Float8ColwiseParallel", "Float8RowwiseParallel", "PrepareFloat8ModuleInput"]

_Layouts = tuple[Placement, ...]


class Float8ColwiseParallel(ColwiseParallel):
    """`ColwiseParallel` for a `Float8Linear`: output features are split over the ranks. Same arguments."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        return _parallelize(self, module, device_mesh, (Replicate(),))


class Float8RowwiseParallel(RowwiseParallel):
    """`RowwiseParallel` for a `Float8Linear`: input features are split over the ranks. Same arguments."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        return _parallelize(self, module, device_mesh, None)


class PrepareFloat8ModuleInput(PrepareModuleInput):
    """`PrepareModuleInput` that casts once for all `Float8Linear` layers of a module that share an input.

    Args:
        float8_dtype: only e4m3fn, the format of inputs.
        fwd_config_submodule_fqn: name of the layer inside the module whose recipe decides; by default all of its
            `Float8Linear` layers, which must then agree.
        **kwargs: those of `PrepareModuleInput`.

    Raises:
        NotImplementedError: another float8_dtype.
    """

    def __init__(
        self,
        *,
        float8_dtype: torch.dtype = torch.float8_e4m3fn,
        fwd_config_submodule_fqn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if float8_dtype != torch.float8_e4m3fn:
            raise NotImplementedError(
                f"PrepareFloat8ModuleInput got float8_dtype={float8_dtype}; want torch.float8_e4m3fn, the format of "
                "inputs in every float8 recipe."
            )
        self.fwd_config_submodule_fqn = fwd_config_submodule_fqn
        self._scaling: Scaling | None = None

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        _check_mesh(type(self).__name__, device_mesh)
        self._scaling = _gather_scaling(self._recipe(module))
        return super()._apply(module, device_mesh)

    def _recipe(self, module: torch.nn.Module) -> LinearRecipe:
        name = self.fwd_config_submodule_fqn
        modules = [module.get_submodule(name)] if name is not None else list(module.modules())
        recipes = {each.recipe for each in modules if isinstance(each, Float8Linear)}
        if len(recipes) != 1:
            raise ValueError(
                f"PrepareFloat8ModuleInput found Float8Linear layers with {len(recipes)} different recipes in "
                f"{type(module).__name__}; want exactly one: convert the model first, and name the layer that decides "
                "by fwd_config_submodule_fqn."
            )
        return recipes.pop()

    def _prepare_input_arg(
        self, input: Any, mesh: DeviceMesh, input_layout: Placement | None, desired_layout: Placement | None
    ) -> Any:
        if input_layout is None:
            return input
        desired = (desired_layout or input_layout,)
        prepared = _redistributed(_as_dtensor(input, mesh, (input_layout,)), desired, self._scaling)
        return carry_codes(prepared, prepared.to_local()) if self.use_local_output else prepared


def _parallelize(
    style: "Float8ColwiseParallel | Float8RowwiseParallel",
    module: torch.nn.Module,
    device_mesh: DeviceMesh,
    desired: _Layouts | None,
) -> torch.nn.Module:
    name = type(style).__name__
    if not isinstance(module, Float8Linear):
        raise ValueError(
            f"{name}: Expecting module to be Float8Linear but found {type(module).__name__}; convert the model with "
            "convert_to_float8_training first, or use torch's style for this layer."
        )
    _check_mesh(name, device_mesh)
    scaling = _gather_scaling(module.recipe)

    def prepare(_: torch.nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        x = _as_dtensor(inputs[0], mesh, style.input_layouts)
        return x if desired is None else _redistributed(x, desired, scaling)

    unwrap_weights(module)
    module = distribute_module(
        module,
        device_mesh,
        style._partition_linear_fn,
        prepare,  # pyrefly: ignore[bad-argument-type]
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
    wrap_weights(module)
    return module


def _check_mesh(name: str, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(f"{name} got a mesh of {mesh.ndim} dimensions; want one: pass the submesh, mesh['tp'].")


def _gather_scaling(recipe: LinearRecipe) -> Scaling | None:
    """The scaling of an input whose codes serve both products that take it, on any rows; None where there is none."""
    scaling = recipe.output.lhs
    if scaling is None or scaling.block != TENSORWISE or recipe.grad_weight.rhs != scaling:
        return None
    return scaling


def _as_dtensor(x: Any, mesh: DeviceMesh, layouts: _Layouts) -> DTensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"a tensor-parallel float8 layer got {type(x).__name__} as its input; want a tensor.")
    if torch.is_autocast_enabled(x.device.type):  # what is cast is what the layer would cast
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(x, DTensor):
        return x
    dtensor = DTensor.from_local(x, mesh, layouts, run_check=False)
    carry_codes(x, dtensor)
    return dtensor


def _redistributed(x: DTensor, desired: _Layouts, scaling: Scaling | None) -> DTensor:
    if tuple(x.placements) == desired:
        return x
    gathers = all(each.is_replicate() for each in desired) and all(each.is_shard() for each in x.placements)
    if gathers and scaling is not None:
        return gather_as_codes(x, scaling)
    return x.redistribute(placements=desired, async_op=True)
