"""The recipe table and its names."""

from dataclasses import replace

import pytest

from aotrain.formats import FLOAT8_E4M3, Scaling
from aotrain.recipes import RECIPE_ALIASES, RECIPES, GemmRecipe, get_recipe, recipe_name


def test_aliases_name_existing_recipes():
    for alias, name in RECIPE_ALIASES.items():
        assert get_recipe(alias) is RECIPES[name]
        assert recipe_name(alias) == name


def test_unknown_recipe_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'float9'.*float8_tensorwise, float8_rowwise.*rowwise_with_gw_hp"):
        get_recipe("float9")


def test_half_quantized_product_is_refused():
    with pytest.raises(ValueError, match="both operands quantized or both None"):
        GemmRecipe(lhs=Scaling(element=FLOAT8_E4M3))


def test_a_transform_of_one_operand_is_refused():
    mx = RECIPES["mxfp4"].grad_weight
    assert mx.lhs is not None
    with pytest.raises(ValueError, match="32 and 0"):
        GemmRecipe(lhs=mx.lhs, rhs=replace(mx.lhs, hadamard=0))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("mx")])
def test_mx_gradients_cannot_saturate(name: str):
    recipe = RECIPES[name]
    gradients = [scaling for scaling in (recipe.grad_input.lhs, recipe.grad_weight.lhs) if scaling is not None]
    assert all(scaling.scale.e8m0_rounding in ("ceil", "rceil") for scaling in gradients)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_have_the_range_they_need(name: str):
    recipe = RECIPES[name]
    want = {"float8_tensorwise": "float8_e5m2", "int8_rowwise": "int8", "mxfp4": "float4_e2m1fn"}.get(
        name, "float8_e4m3fn"
    )
    assert recipe.grad_input.lhs is not None
    assert recipe.grad_input.lhs.element.name == want
    # Hardware accumulates exactly in int32, and per 128 or 32 terms with scales along K.
    assert recipe.output.fast_accum == (
        name not in ("int8_rowwise", "float8_blockwise", "mxfp8", "mxfp8_gw_hp", "mxfp4")
    )
    assert not recipe.grad_input.fast_accum
    assert hash(recipe) == hash(RECIPES[name])
