"""MXLinear: `nn.Linear` whose three matrix products run in MX formats."""

from typing import Any, Self

import torch

from aotrain.nn.float8_linear import Float8Linear
from aotrain.nn.mx_config import KernelPreference, MXFP8TrainingOpConfig, MXLinearConfig, ScaleCalculationMode


class MXLinear(Float8Linear):
    """Linear layer computed by `aotrain.ops.scaled_linear` in an MX recipe.

    Parameters, hooks, state_dict, and what else holds for a `Float8Linear`: of that it only differs in its recipes.

    Args:
        *args: positional arguments of `nn.Linear`: in_features, out_features, bias, device, dtype.
        config: an `MXLinearConfig`, or the name of an MX recipe.
        **kwargs: keyword arguments of `nn.Linear`.
    """

    def __init__(self, *args: Any, config: MXLinearConfig | str = "mxfp8", **kwargs: Any) -> None:
        super().__init__(*args, config=linear_config(config), **kwargs)

    @classmethod
    def from_float(  # pyrefly: ignore[bad-override]
        cls, mod: torch.nn.Linear, config: MXLinearConfig | str = "mxfp8"
    ) -> Self:
        """An MXLinear with the same Parameter objects, hooks, buffers and training flag as `mod`."""
        return cls._sharing(mod, linear_config(config))


class MXFP8Linear(MXLinear):
    """`MXLinear` in mxfp8, with the arguments that torchao's class of this name has.

    Args:
        *args: positional arguments of `nn.Linear`: in_features, out_features, bias, device, dtype.
        kernel_preference: AUTO or EMULATED.
        scale_calculation_mode: of every scale.
        wgrad_with_hp: keep the grad_weight product in high precision.
        **kwargs: keyword arguments of `nn.Linear`.
    """

    def __init__(
        self,
        *args: Any,
        kernel_preference: KernelPreference = KernelPreference.AUTO,
        scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL,
        wgrad_with_hp: bool = False,
        **kwargs: Any,
    ) -> None:
        config = MXFP8TrainingOpConfig(
            kernel_preference=kernel_preference,
            scale_calculation_mode=scale_calculation_mode,
            wgrad_with_hp=wgrad_with_hp,
        )
        super().__init__(*args, config=config.to_linear_config(), **kwargs)


def linear_config(config: MXLinearConfig | MXFP8TrainingOpConfig | str) -> MXLinearConfig:
    """The configuration of a layer, from any way to write it.

    Raises:
        ValueError: an unknown recipe, or one that is not MX.
        TypeError: anything else.
    """
    if isinstance(config, str):
        return MXLinearConfig(recipe=config)
    if isinstance(config, MXFP8TrainingOpConfig):
        return config.to_linear_config()
    if isinstance(config, MXLinearConfig):
        return config
    raise TypeError(
        f"MX training got a {type(config).__name__}; want the name of a recipe, an MXLinearConfig, an "
        "MXFP8TrainingOpConfig or an NVFP4TrainingConfig."
    )
