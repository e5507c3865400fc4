"""Float8LinearConfig: the configuration class that float8 users already write, translated to a `LinearRecipe`.

It has the fields, defaults and recipe names of torchao's class of the same name, so that a configuration moves over by
changing the import. It is immutable in fact: defaults that depend on other fields are resolved by `to_recipe`, on a
copy, never written back into the objects that the caller passed.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    ELEMENT_FORMATS,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ElementFormat,
    Scaling,
)
from aotrain.nn.gathered_weight import planes_of
from aotrain.ops import check_save_for_backward
from aotrain.recipes import GemmRecipe, LinearRecipe, recipe_name


class ScalingType(Enum):
    """Whether an operand is quantized."""

    DYNAMIC = "dynamic"
    DISABLED = "disabled"

    def short_str(self) -> str:
        """Three letters for module reprs."""
        return {"dynamic": "dyn", "disabled": "dis"}[self.value]


class ScalingGranularity(Enum):
    """How many elements share a scale.

    The whole tensor; one row along the contracted dimension; or 128 elements of such a row (weights: 128 rows of 128).
    """

    TENSORWISE = "tensorwise"
    AXISWISE = "axiswise"
    BLOCKWISE = "blockwise"

    def short_str(self) -> str:
        """Three letters for module reprs."""
        return {"tensorwise": "ten", "axiswise": "axs", "blockwise": "blk"}[self.value]


class Float8LinearRecipeName(Enum):
    """Names accepted by `Float8LinearConfig.from_recipe_name`."""

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    BLOCKWISE = "blockwise"
    INT8_ROWWISE = "int8_rowwise"


_ELEMENT_OF_DTYPE = {row.dtype: row for row in ELEMENT_FORMATS.values() if not row.stored_as_codes}


@dataclass(frozen=True)
class CastConfig:
    """How one operand is cast.

    Attributes:
        scaling_type: DYNAMIC (scale from the tensor's own amax) or DISABLED (stays in high precision).
        scaling_granularity: TENSORWISE, AXISWISE for one scale per row, or BLOCKWISE.
        target_dtype: a float8 dtype or int8; None is e4m3 for input and weight, e5m2 for grad_output.

    Raises:
        ValueError: axiswise granularity of a disabled cast, or a target that is neither float8 nor int8.
    """

    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.scaling_granularity is ScalingGranularity.AXISWISE and self.scaling_type is not ScalingType.DYNAMIC:
            raise ValueError(
                "only dynamic scaling type is supported for axiswise scaling granularity; "
                f"got scaling_type={self.scaling_type}. Use ScalingType.DYNAMIC or leave the granularity tensorwise."
            )
        if self.target_dtype is not None and self.target_dtype not in _ELEMENT_OF_DTYPE:
            valid = ", ".join(str(dtype) for dtype in _ELEMENT_OF_DTYPE)
            raise ValueError(
                f"must specify a 8-bit floating-point dtype, or int8; got target_dtype={self.target_dtype}, want one "
                f"of {valid}."
            )

    def short_str(self) -> str:
        """Compact form for module reprs, e.g. `dyn_ten_e4m3`."""
        names = {torch.float8_e5m2: "e5m2", torch.float8_e5m2fnuz: "e5m2", torch.int8: "int8"}
        element = names.get(self.target_dtype, "e4m3") if self.target_dtype else "e4m3"
        return f"{self.scaling_type.short_str()}_{self.scaling_granularity.short_str()}_{element}"


@dataclass(frozen=True)
class Float8GemmConfig:
    """How one product accumulates: `use_fast_accum` trades accumulation precision for speed on Hopper."""

    use_fast_accum: bool = False


@dataclass(frozen=True)
class Float8LinearConfig:
    """Float8 training of `nn.Linear`: casts of the three operands in the three products.

    Attributes:
        cast_config_input: input in the output product.
        cast_config_input_for_grad_weight: input in the grad_weight product; None is the same as above.
        cast_config_weight: weight in the output product.
        cast_config_weight_for_grad_input: weight in the grad_input product; None is the same as above.
        cast_config_grad_output: grad_output in the grad_input product.
        cast_config_grad_output_for_grad_weight: grad_output in the grad_weight product; None is the same as above.
        gemm_config_output: accumulation of the output product; fast by default.
        gemm_config_grad_input: accumulation of the grad_input product.
        gemm_config_grad_weight: accumulation of the grad_weight product.
        enable_fsdp_float8_all_gather: FSDP2 gathers the codes of weights, one byte per element, instead of their values
            in the dtype of mixed precision; same result, bit for bit. Recipes whose two uses of the weight have
            different scales (rowwise) gather one set of codes for forward and one for backward, so they save bytes only
            where a layer is gathered twice per step (reshard_after_forward=True).
        pad_inner_dim: accepted for compatibility and always in effect: awkward shapes are padded where needed.
        emulate: bfloat16 arithmetic with float8 numerics, for hardware without float8. CPU always emulates.
        force_recompute_fp8_weight_in_bwd: keep no codes of the weight from forward to backward: switches
            cache_weight_casts off. Compiled graphs never keep them.
        round_scales_to_power_of_2: round inverse scales down to powers of two, which makes scaling exact.
        save_for_backward: what a layer keeps from forward to backward. The results are the same. "high_precision": its
            input. "quantized": the codes of its input for the grad_weight product, half the bytes of bfloat16; pays
            where the input has no other user. "recompute": its input and, whatever cache_weight_casts says, nothing
            that was cast in forward, also where torch.compile would have kept the codes of the input instead of making
            them again; for models that are short of memory, or whose inputs others keep anyway.
        cache_weight_casts: keep a weight's codes, up to 2 bytes per element, between two optimizer steps in layers that
            run several times (gradient accumulation, evaluation). No effect in compiled graphs.

    Raises:
        ValueError: operands of one product that cannot be combined, one operand cast to two dtypes, an unknown
            `save_for_backward`, or enable_fsdp_float8_all_gather with a product of the weight in high precision.
    """

    cast_config_input: CastConfig = CastConfig()
    cast_config_input_for_grad_weight: CastConfig | None = None
    cast_config_weight: CastConfig = CastConfig()
    cast_config_weight_for_grad_input: CastConfig | None = None
    cast_config_grad_output: CastConfig = CastConfig()
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    gemm_config_output: Float8GemmConfig = Float8GemmConfig(use_fast_accum=True)
    gemm_config_grad_input: Float8GemmConfig = Float8GemmConfig()
    gemm_config_grad_weight: Float8GemmConfig = Float8GemmConfig()
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False
    emulate: bool = False
    force_recompute_fp8_weight_in_bwd: bool = False
    round_scales_to_power_of_2: bool = False
    save_for_backward: str = "high_precision"
    cache_weight_casts: bool = True

    def __post_init__(self) -> None:
        check_save_for_backward(self.save_for_backward)
        recipe = self.to_recipe()  # every inconsistency is reported at construction, not in the first forward
        if self.enable_fsdp_float8_all_gather:
            planes_of(recipe)

    @staticmethod
    def from_recipe_name(name: "Float8LinearRecipeName | str") -> "Float8LinearConfig":
        """The configuration of a named recipe; ValueError listing the valid names for an unknown one."""
        canonical = recipe_name(name.value if isinstance(name, Float8LinearRecipeName) else name)
        if canonical not in _RECIPE_CONFIGS:
            raise ValueError(
                f"Float8LinearConfig cannot express {canonical!r}; want one of {', '.join(_RECIPE_CONFIGS)}. The MX "
                "recipes are for convert_to_mx_training."
            )
        return _RECIPE_CONFIGS[canonical]

    @property
    def caches_weight_casts(self) -> bool:
        """Whether codes of a weight outlive a forward: `cache_weight_casts`, if nothing that needs more says no."""
        forced = self.force_recompute_fp8_weight_in_bwd or self.save_for_backward == "recompute"
        return self.cache_weight_casts and not forced

    def to_recipe(self) -> LinearRecipe:
        """The `LinearRecipe` this configuration means."""
        x, w, g = self.cast_config_input, self.cast_config_weight, self.cast_config_grad_output
        x_gw = self.cast_config_input_for_grad_weight or x
        w_gi = self.cast_config_weight_for_grad_input or w
        g_gw = self.cast_config_grad_output_for_grad_weight or g
        x_default, w_default, g_default = FLOAT8_E4M3, FLOAT8_E4M3, FLOAT8_E5M2
        for operand, first, second, default in (
            ("input", x, x_gw, x_default),
            ("weight", w, w_gi, w_default),
            ("grad_output", g, g_gw, g_default),
        ):
            if _element(first, default) != _element(second, default):
                raise ValueError(
                    f"{operand} must be cast to the same dtype in both matmuls it's used in; got "
                    f"{_element(first, default).dtype} and {_element(second, default).dtype}. Set the same "
                    f"target_dtype in cast_config_{operand} and its '_for_' twin."
                )
        return LinearRecipe(
            output=self._gemm("output", (x, x_default), (w, w_default), self.gemm_config_output, weight=True),
            grad_input=self._gemm(
                "grad_input", (g, g_default), (w_gi, w_default), self.gemm_config_grad_input, weight=True
            ),
            grad_weight=self._gemm("grad_weight", (g_gw, g_default), (x_gw, x_default), self.gemm_config_grad_weight),
        )

    def _gemm(
        self,
        gemm: str,
        lhs: tuple[CastConfig, ElementFormat],
        rhs: tuple[CastConfig, ElementFormat],
        gemm_config: Float8GemmConfig,
        *,
        weight: bool = False,
    ) -> GemmRecipe:
        scalings = [self._scaling(*lhs), self._scaling(*rhs, weight=weight)]
        if (scalings[0] is None) != (scalings[1] is None):
            raise ValueError(
                f"incompatible operand precision for {gemm}: one operand is DISABLED and the other is not; disable or "
                "enable both."
            )
        if scalings[0] is None:
            return GemmRecipe()
        return GemmRecipe(lhs=scalings[0], rhs=scalings[1], fast_accum=gemm_config.use_fast_accum)

    def _scaling(self, cast: CastConfig, default: ElementFormat, *, weight: bool = False) -> Scaling | None:
        if cast.scaling_type is ScalingType.DISABLED:
            return None
        blocks = {
            ScalingGranularity.TENSORWISE: TENSORWISE,
            ScalingGranularity.AXISWISE: ROWWISE,
            ScalingGranularity.BLOCKWISE: BLOCKWISE_128X128 if weight else BLOCKWISE_1X128,
        }
        return Scaling(
            element=_element(cast, default),
            scale=SCALE_FORMATS["float32_pow2" if self.round_scales_to_power_of_2 else "float32"],
            block=blocks[cast.scaling_granularity],
        )


def _element(cast: CastConfig, default: ElementFormat) -> ElementFormat:
    return default if cast.target_dtype is None else _ELEMENT_OF_DTYPE[cast.target_dtype]


_ROW_E4M3 = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=torch.float8_e4m3fn)
_ROWWISE_CONFIG = Float8LinearConfig(
    cast_config_input=_ROW_E4M3,
    cast_config_weight=_ROW_E4M3,
    cast_config_grad_output=_ROW_E4M3,
    round_scales_to_power_of_2=True,
)
_BLOCK_E4M3 = CastConfig(scaling_granularity=ScalingGranularity.BLOCKWISE, target_dtype=torch.float8_e4m3fn)
_ROW_INT8 = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=torch.int8)
_RECIPE_CONFIGS = {
    "float8_tensorwise": Float8LinearConfig(),
    "float8_rowwise": _ROWWISE_CONFIG,
    "float8_rowwise_with_gw_hp": replace(
        _ROWWISE_CONFIG,
        cast_config_weight_for_grad_input=CastConfig(target_dtype=torch.float8_e4m3fn),
        cast_config_input_for_grad_weight=CastConfig(ScalingType.DISABLED, target_dtype=torch.float8_e4m3fn),
        cast_config_grad_output_for_grad_weight=CastConfig(ScalingType.DISABLED, target_dtype=torch.float8_e4m3fn),
    ),
    "float8_blockwise": Float8LinearConfig(
        cast_config_input=_BLOCK_E4M3,
        cast_config_weight=_BLOCK_E4M3,
        cast_config_grad_output=_BLOCK_E4M3,
        gemm_config_output=Float8GemmConfig(),
        round_scales_to_power_of_2=True,
    ),
    "int8_rowwise": Float8LinearConfig(
        cast_config_input=_ROW_INT8,
        cast_config_weight=_ROW_INT8,
        cast_config_grad_output=_ROW_INT8,
        gemm_config_output=Float8GemmConfig(),
    ),
}
# The recipes that this class can express.
FLOAT8_LINEAR_RECIPES = tuple(_RECIPE_CONFIGS)
