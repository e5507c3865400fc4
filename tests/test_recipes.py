"""The recipe table and its names."""

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


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_have_the_range_they_need(name: str):
    recipe = RECIPES[name]
    want = {"float8_tensorwise": "float8_e5m2", "int8_rowwise": "int8"}.get(name, "float8_e4m3fn")
    assert recipe.grad_input.lhs is not None
    assert recipe.grad_input.lhs.element.name == want
    # Hardware accumulates exactly in int32, and per 128 terms with scales along K.
    assert recipe.output.fast_accum == (name not in ("int8_rowwise", "float8_blockwise"))
    assert not recipe.grad_input.fast_accum
    assert hash(recipe) == hash(RECIPES[name])
