"""Configurations of MX training, under the names that users of this field already write.

`MXLinearConfig` is what a layer takes. `MXFP8TrainingOpConfig` and `Float8TrainingOpConfig` have the fields, defaults
and recipe names of torchao's classes, which configure linear layers and experts of a mixture alike; a linear layer has
no use for some of them, and says so below.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch

from aotrain.formats import FLOAT8_E4M3, SCALE_FORMATS, Scaling, is_mx
from aotrain.nn.float8_config import Float8LinearConfig
from aotrain.ops import check_save_for_backward
from aotrain.recipes import HIGH_PRECISION, RECIPE_ALIASES, RECIPES, GemmRecipe, LinearRecipe


class ScaleCalculationMode(Enum):
    """How the largest magnitude of a block becomes its power-of-two scale; `aotrain.formats.e8m0` has the formulas."""

    FLOOR = "floor"
    RCEIL = "rceil"
    CEIL = "ceil"
    EVEN = "even"


class KernelPreference(str, Enum):  # noqa: UP042  a StrEnum prints otherwise than the one users know
    """AUTO runs products natively where the hardware has them and emulates elsewhere, EMULATED emulates everywhere.

    TORCH, MSLK and TRITON name other libraries' kernels; configurations written elsewhere hold them. They mean AUTO.
    """

    AUTO = "auto"
    TORCH = "torch"
    MSLK = "mslk"
    EMULATED = "emulated"
    TRITON = "triton"


class MXFP8TrainingRecipe(Enum):
    """Names that `MXFP8TrainingOpConfig.from_recipe` accepts."""

    MXFP8_RCEIL = "mxfp8_rceil"
    MXFP8_RCEIL_WGRAD_WITH_HP = "mxfp8_rceil_wgrad_with_hp"
    MXFP8_EMULATED_RCEIL = "mxfp8_emulated_rceil"


class Float8TrainingRecipe(Enum):
    """Names that `Float8TrainingOpConfig.from_recipe` accepts."""

    FP8_ROWWISE = "fp8_rowwise"


@dataclass(frozen=True, kw_only=True)
class MXLinearConfig:
    """MX training of a linear layer.

    Attributes:
        recipe: "mxfp8", "mxfp8_gw_hp", "mxfp4", or a `LinearRecipe` whose quantized products all have MX operands.
        scale_calculation_mode: replaces the recipe's way to calculate scales; None keeps it. FLOOR and EVEN saturate
            the largest elements, which also biases what is rounded stochastically.
        emulate: as for `Float8LinearConfig`.
        save_for_backward: as for `Float8LinearConfig`.
        cache_weight_casts: as for `Float8LinearConfig`.

    Raises:
        ValueError: an unknown recipe or one that is not MX, or an unknown `save_for_backward`.
    """

    recipe: str | LinearRecipe = "mxfp8"
    scale_calculation_mode: ScaleCalculationMode | None = None
    emulate: bool = False
    save_for_backward: str = "high_precision"
    cache_weight_casts: bool = True

    def __post_init__(self) -> None:
        check_save_for_backward(self.save_for_backward)
        self.to_recipe()

    @property
    def enable_fsdp_float8_all_gather(self) -> bool:
        """FSDP2 gathers these weights in high precision."""
        return False

    @property
    def caches_weight_casts(self) -> bool:
        """Whether codes of a weight outlive a forward."""
        return self.cache_weight_casts and self.save_for_backward != "recompute"

    def to_recipe(self) -> LinearRecipe:
        """The `LinearRecipe` this configuration means."""
        name = self.recipe
        recipe = RECIPES.get(RECIPE_ALIASES.get(name, name)) if isinstance(name, str) else name
        if recipe is None or not is_mx_recipe(recipe):
            valid = ", ".join(name for name, row in RECIPES.items() if is_mx_recipe(row))
            raise ValueError(
                f"MX training got recipe {self.recipe!r}; want one of {valid}, or for convert_to_mx_training nvfp4, "
                "whose configuration is NVFP4TrainingConfig."
            )
        if self.scale_calculation_mode is None:
            return recipe
        scale = SCALE_FORMATS[f"e8m0_{self.scale_calculation_mode.value}"]

        def with_scale(gemm: GemmRecipe) -> GemmRecipe:
            lhs, rhs = (None if scaling is None else replace(scaling, scale=scale) for scaling in (gemm.lhs, gemm.rhs))
            return replace(gemm, lhs=lhs, rhs=rhs)

        return LinearRecipe(
            output=with_scale(recipe.output),
            grad_input=with_scale(recipe.grad_input),
            grad_weight=with_scale(recipe.grad_weight),
        )


@dataclass(frozen=True)
class MXFP8TrainingOpConfig:
    """mxfp8 training of linear layers and of experts.

    Attributes:
        kernel_preference: AUTO or EMULATED.
        out_dtype: of the products of experts. Linear layers return their input's dtype.
        wgrad_with_hp: keep the grad_weight product in high precision.
        scale_calculation_mode: of every scale.
        pad_token_groups_for_grouped_mm: of experts. Linear layers take any number of rows.
    """

    kernel_preference: KernelPreference = KernelPreference.AUTO
    out_dtype: torch.dtype = torch.bfloat16
    wgrad_with_hp: bool = False
    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    pad_token_groups_for_grouped_mm: bool = False

    @classmethod
    def from_recipe(cls, recipe: MXFP8TrainingRecipe) -> "MXFP8TrainingOpConfig":
        """The configuration of a named recipe; ValueError for anything else."""
        if recipe is MXFP8TrainingRecipe.MXFP8_RCEIL:
            return cls()
        if recipe is MXFP8TrainingRecipe.MXFP8_RCEIL_WGRAD_WITH_HP:
            return cls(wgrad_with_hp=True)
        if recipe is MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL:
            return cls(kernel_preference=KernelPreference.EMULATED)
        valid = ", ".join(str(each) for each in MXFP8TrainingRecipe)
        raise ValueError(f"Unsupported MXFP8 recipe: {recipe}; want one of {valid}.")

    def to_linear_config(self) -> MXLinearConfig:
        """What it means for a linear layer."""
        return MXLinearConfig(
            recipe="mxfp8_gw_hp" if self.wgrad_with_hp else "mxfp8",
            scale_calculation_mode=self.scale_calculation_mode,
            emulate=self.kernel_preference is KernelPreference.EMULATED,
        )


@dataclass(frozen=True)
class Float8TrainingOpConfig:
    """Float8 training of linear layers and of experts.

    Attributes:
        float8_dtype: of experts' operands, and of linear layers'; torch.float8_e4m3fn.
        out_dtype: of the products of experts. Linear layers return their input's dtype.
        pad_token_groups_for_grouped_mm: of experts. Linear layers take any number of rows.
        float8_linear_recipe: of linear layers, a name that `Float8LinearConfig.from_recipe_name` accepts.

    Raises:
        ValueError: another float8_dtype, or an unknown recipe.
    """

    float8_dtype: torch.dtype = torch.float8_e4m3fn
    out_dtype: torch.dtype = torch.bfloat16
    pad_token_groups_for_grouped_mm: bool = False
    float8_linear_recipe: str = "rowwise"

    def __post_init__(self) -> None:
        if self.float8_dtype != FLOAT8_E4M3.dtype:
            raise ValueError(
                f"Float8TrainingOpConfig got float8_dtype={self.float8_dtype}; want torch.float8_e4m3fn. For other "
                "formats of linear layers write a Float8LinearConfig."
            )
        self.to_linear_config()

    @classmethod
    def from_recipe(cls, recipe: Float8TrainingRecipe) -> "Float8TrainingOpConfig":
        """The configuration of a named recipe; ValueError for anything else."""
        if recipe is Float8TrainingRecipe.FP8_ROWWISE:
            return cls()
        valid = ", ".join(str(each) for each in Float8TrainingRecipe)
        raise ValueError(f"Unsupported FP8 recipe: {recipe}; want one of {valid}.")

    def to_linear_config(self) -> Float8LinearConfig:
        """What it means for a linear layer."""
        return Float8LinearConfig.from_recipe_name(self.float8_linear_recipe)


def is_mx_recipe(recipe: LinearRecipe) -> bool:
    """Whether a recipe quantizes, and to MX only."""
    gemms = [gemm for gemm in (recipe.output, recipe.grad_input, recipe.grad_weight) if gemm != HIGH_PRECISION]
    scalings: list[Scaling | None] = [scaling for gemm in gemms for scaling in (gemm.lhs, gemm.rhs)]
    return bool(gemms) and all(scaling is not None and is_mx(scaling) for scaling in scalings)
