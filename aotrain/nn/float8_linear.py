"""Float8Linear: `nn.Linear` whose three matrix products run in float8."""

from typing import Any, Literal, Self, TypeVar

import torch

from aotrain.nn.float8_config import Float8LinearConfig
from aotrain.nn.fsdp_weight import fsdp_weight_of
from aotrain.nn.fsdp_wrap import plain_tensor, wrap_weights
from aotrain.nn.gathered_weight import Planes, planes_of, traced_cast_weight
from aotrain.nn.input_casts import SharedInputCasts
from aotrain.nn.mx_config import MXLinearConfig
from aotrain.nn.weight_casts import WeightCastCache
from aotrain.ops import WeightCasts, cast_operand, cast_weight, scaled_linear
from aotrain.recipes import GemmRecipe, LinearRecipe

LayerConfig = Float8LinearConfig | MXLinearConfig | LinearRecipe
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


class Float8Linear(torch.nn.Linear):
    """Linear layer computed by `aotrain.ops.scaled_linear`.

    The parameters are ordinary `nn.Parameter`s named weight and bias, so state_dict, optimizers, FSDP2 and checkpoints
    see a plain `nn.Linear`.

    Args:
        *args: positional arguments of `nn.Linear`: in_features, out_features, bias, device, dtype.
        config: a `Float8LinearConfig`, or a `LinearRecipe` for formats that class cannot express.
        emulate: overrides the configuration's `emulate` when given.
        **kwargs: keyword arguments of `nn.Linear`.
    """

    config: LayerConfig
    recipe: LinearRecipe
    emulate: bool
    save_for_backward: str
    weight_casts: WeightCasts
    # Under tensor parallelism: see `aotrain.nn.sharded_linear`.
    tensor_parallel_scales: Literal["whole", "own"]
    # What FSDP2 gathers; None: the weight in high precision.
    fsdp_planes: Planes | None

    def __init__(self, *args: Any, config: LayerConfig, emulate: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_config(config, emulate)
        wrap_weights(self)

    @classmethod
    def from_float(cls, mod: torch.nn.Linear, config: LayerConfig | None = None) -> Self:
        """A Float8Linear with the same Parameter objects, hooks, buffers and training flag as `mod`.

        With enable_fsdp_float8_all_gather the weight is a new Parameter of the same memory.
        """
        new = cls._sharing(mod, Float8LinearConfig() if config is None else config)
        wrap_weights(new)
        return new

    @classmethod
    def _sharing(cls, mod: torch.nn.Linear, config: LayerConfig) -> Self:
        new = clone_as(mod, cls)
        new._set_config(config, None)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]; see `aotrain.ops.scaled_linear`."""
        if hasattr(self.weight, "device_mesh"):  # a DTensor
            from aotrain.nn.sharded_linear import sharded_linear

            return sharded_linear(self, input, scales=self.tensor_parallel_scales)
        return scaled_linear(
            input,
            self.weight,
            self.bias,
            self.recipe,
            emulate=self.emulate,
            save_for_backward=self.save_for_backward,
            # A compiled graph does not look at versions of tensors; it finds equal casts by itself.
            weight_casts=traced_cast_weight if torch.compiler.is_compiling() else self.weight_casts,
            operand_casts=cast_operand if torch.compiler.is_compiling() else SharedInputCasts(input),
        )

    def extra_repr(self) -> str:
        """nn.Linear's, with the formats of the three products."""
        gemms = {name: getattr(self.recipe, name) for name in ("output", "grad_input", "grad_weight")}
        return ", ".join([super().extra_repr(), *(f"{name}=({_short(gemm)})" for name, gemm in gemms.items())])

    def _set_config(self, config: LayerConfig, emulate: bool | None) -> None:
        self.config = config
        if isinstance(config, LinearRecipe):
            self.recipe, settings = config, Float8LinearConfig()
        else:
            self.recipe, settings = config.to_recipe(), config
        self.emulate = settings.emulate if emulate is None else emulate
        self.save_for_backward = settings.save_for_backward
        self.weight_casts = WeightCastCache() if settings.caches_weight_casts else cast_weight
        self.tensor_parallel_scales = "whole"
        self.fsdp_planes = planes_of(self.recipe) if settings.enable_fsdp_float8_all_gather else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = plain_tensor(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = fsdp_weight_of(self.weight)
        super()._load_from_state_dict(*args, **kwargs)
        if before is not None:  # load_state_dict(assign=True) brings ordinary parameters
            wrap_weights(self, splits=before.splits)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.fsdp_planes is not None:  # a pickle holds ordinary parameters
            wrap_weights(self)


def clone_as(mod: torch.nn.Module, cls: type[ModuleT]) -> ModuleT:
    """An instance of `cls` that shares mod's parameters, buffers, hooks and attributes without calling `__init__`.

    The containers are copied, so that registering something on one module does not change the other.
    """
    new = cls.__new__(cls)
    new.__dict__ = {
        name: value.copy() if name.startswith("_") and isinstance(value, dict) else value
        for name, value in mod.__dict__.items()
    }
    return new


def _short(gemm: GemmRecipe) -> str:
    return str(gemm).replace("float8_", "").replace("float32", "fp32")
