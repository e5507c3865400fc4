"""Float8LinearConfig: every field of the class that users know, and what it translates to."""

import dataclasses

import pytest
import torch

from aotrain.formats import ROWWISE, TENSORWISE
from aotrain.nn import (
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.recipes import RECIPES

AXISWISE = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
DISABLED = CastConfig(ScalingType.DISABLED)


def test_fields_and_defaults_in_order():
    fields = [(field.name, field.default) for field in dataclasses.fields(Float8LinearConfig)]
    assert fields == [
        ("cast_config_input", CastConfig()),
        ("cast_config_input_for_grad_weight", None),
        ("cast_config_weight", CastConfig()),
        ("cast_config_weight_for_grad_input", None),
        ("cast_config_grad_output", CastConfig()),
        ("cast_config_grad_output_for_grad_weight", None),
        ("gemm_config_output", Float8GemmConfig(use_fast_accum=True)),
        ("gemm_config_grad_input", Float8GemmConfig()),
        ("gemm_config_grad_weight", Float8GemmConfig()),
        ("enable_fsdp_float8_all_gather", False),
        ("pad_inner_dim", False),
        ("emulate", False),
        ("force_recompute_fp8_weight_in_bwd", False),
        ("round_scales_to_power_of_2", False),
        # Ours, after those of the class that users know.
        ("save_for_backward", "high_precision"),
        ("cache_weight_casts", True),
    ]


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_named_recipes_translate_to_the_table(name: str):
    short = name.removeprefix("float8_")
    for spelling in (name, short, Float8LinearRecipeName(short)):
        assert Float8LinearConfig.from_recipe_name(spelling).to_recipe() == RECIPES[name]


def test_default_is_tensorwise():
    assert Float8LinearConfig().to_recipe() == RECIPES["float8_tensorwise"]


def test_unknown_recipe_lists_the_valid_ones():
    with pytest.raises(ValueError, match="rowwise_with_gw_hp"):
        Float8LinearConfig.from_recipe_name("delayed")


def test_each_cast_reaches_its_operand():
    recipe = Float8LinearConfig(cast_config_input=AXISWISE).to_recipe()
    assert recipe.output.lhs.block == recipe.grad_weight.rhs.block == ROWWISE
    assert recipe.output.rhs.block == recipe.grad_input.rhs.block == TENSORWISE
    recipe = Float8LinearConfig(cast_config_weight_for_grad_input=AXISWISE).to_recipe()
    assert (recipe.output.rhs.block, recipe.grad_input.rhs.block) == (TENSORWISE, ROWWISE)
    recipe = Float8LinearConfig(cast_config_grad_output_for_grad_weight=AXISWISE).to_recipe()
    assert (recipe.grad_input.lhs.block, recipe.grad_weight.lhs.block) == (TENSORWISE, ROWWISE)
    off = Float8LinearConfig(
        cast_config_input_for_grad_weight=DISABLED, cast_config_grad_output_for_grad_weight=DISABLED
    ).to_recipe()
    assert not off.grad_weight.quantized
    assert off.output.quantized


def test_gemm_configs_and_power_of_two_scales():
    fast = Float8GemmConfig(use_fast_accum=True)
    config = Float8LinearConfig(gemm_config_grad_weight=fast, round_scales_to_power_of_2=True)
    recipe = config.to_recipe()
    gemms = (recipe.output, recipe.grad_input, recipe.grad_weight)
    assert [gemm.fast_accum for gemm in gemms] == [True, False, True]
    for gemm in gemms:
        assert gemm.lhs.scale.power_of_two
        assert gemm.rhs.scale.power_of_two


def test_sharing_one_cast_config_keeps_e5m2_gradients():
    """The class this one replaces writes the dtype into the shared object and ends with e4m3 gradients."""
    shared = CastConfig()
    config = Float8LinearConfig(cast_config_input=shared, cast_config_grad_output=shared)
    assert shared.target_dtype is None
    assert config.to_recipe() == RECIPES["float8_tensorwise"]
    assert hash(config) == hash(Float8LinearConfig())


def test_inconsistent_configurations_are_refused():
    with pytest.raises(ValueError, match="incompatible operand precision for output"):
        Float8LinearConfig(cast_config_input=DISABLED)
    with pytest.raises(ValueError, match="incompatible operand precision for grad_weight"):
        Float8LinearConfig(cast_config_grad_output_for_grad_weight=DISABLED)
    with pytest.raises(ValueError, match="weight must be cast to the same dtype"):
        Float8LinearConfig(cast_config_weight_for_grad_input=CastConfig(target_dtype=torch.float8_e5m2))
    with pytest.raises(ValueError, match="only dynamic scaling type"):
        CastConfig(ScalingType.DISABLED, ScalingGranularity.AXISWISE)
    with pytest.raises(ValueError, match="8-bit floating-point"):
        CastConfig(target_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="want both quantized"):
        Float8LinearConfig(
            cast_config_input=DISABLED,
            cast_config_weight=DISABLED,
            cast_config_weight_for_grad_input=CastConfig(),
            cast_config_input_for_grad_weight=CastConfig(),
            enable_fsdp_float8_all_gather=True,
        )


def test_compatibility_flags_are_accepted():
    config = Float8LinearConfig(pad_inner_dim=True, force_recompute_fp8_weight_in_bwd=True, emulate=True)
    assert config.to_recipe() == RECIPES["float8_tensorwise"]


def test_what_keeps_codes_of_a_weight():
    assert Float8LinearConfig().caches_weight_casts
    for options in (
        {"cache_weight_casts": False},
        {"force_recompute_fp8_weight_in_bwd": True},
        {"save_for_backward": "recompute"},
    ):
        assert not Float8LinearConfig(**options).caches_weight_casts


def test_short_strings():
    assert CastConfig(target_dtype=torch.float8_e5m2).short_str() == "dyn_ten_e5m2"
    assert AXISWISE.short_str() == "dyn_axs_e4m3"
    assert DISABLED.short_str() == "dis_ten_e4m3"


def test_unknown_choice_of_what_to_keep():
    with pytest.raises(
        ValueError, match="save_for_backward got 'low'; want one of 'high_precision', 'quantized', 'recompute'"
    ):
        Float8LinearConfig(save_for_backward="low")


def test_blockwise_takes_squares_of_weights_and_vectors_of_the_rest():
    recipe = Float8LinearConfig.from_recipe_name("blockwise").to_recipe()
    assert [scaling.block for scaling in (recipe.output.lhs, recipe.output.rhs)] == [(1, 128), (128, 128)]
    assert [scaling.block for scaling in (recipe.grad_input.lhs, recipe.grad_input.rhs)] == [(1, 128), (128, 128)]
    assert [scaling.block for scaling in (recipe.grad_weight.lhs, recipe.grad_weight.rhs)] == [(1, 128)] * 2
