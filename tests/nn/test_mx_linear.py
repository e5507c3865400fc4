"""MX training of modules: conversion beside float8's, the configurations' names, and what stays as in nn.Linear."""

import copy
from enum import Enum

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotrain.nn import (
    Float8Linear,
    Float8LinearConfig,
    Float8TrainingOpConfig,
    Float8TrainingRecipe,
    KernelPreference,
    MXFP8Linear,
    MXFP8TrainingOpConfig,
    MXFP8TrainingRecipe,
    MXLinear,
    MXLinearConfig,
    ScaleCalculationMode,
    conversion_report,
    convert_to_float8_training,
    convert_to_mx_training,
    save_products,
    unconvert,
)
from aotrain.nn.mx_config import is_mx_recipe
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal, sqnr

MX_RECIPES = [name for name, recipe in RECIPES.items() if is_mx_recipe(recipe)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 70), nn.Linear(70, 48, bias=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(self.up(x).relu()))


def build(recipe: str | MXLinearConfig | MXFP8TrainingOpConfig = "mxfp8") -> Model:
    torch.manual_seed(0)
    return convert_to_mx_training(Model(), recipe, module_filter_fn=lambda _, fqn: fqn != "head")


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(param.grad.clone() for param in model.parameters())]


def test_the_recipes_are_those_of_the_table():
    assert MX_RECIPES == ["mxfp8", "mxfp8_gw_hp", "mxfp4"]


@pytest.mark.parametrize("recipe", MX_RECIPES)
def test_conversion_keeps_parameters_and_state(recipe: str):
    model = Model()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    assert convert_to_mx_training(model, recipe, module_filter_fn=lambda _, fqn: fqn != "head") is model
    assert all(param is parameters[name] for name, param in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model.up, MXLinear)
    assert type(model.head) is nn.Linear
    assert model.up.recipe == RECIPES[recipe]
    assert conversion_report(model).converted == ("up", "down")
    x = torch.randn(9, 48)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    assert sqnr(plain(x), model(x)) > 10
    unconvert(model)
    assert type(model.up) is nn.Linear
    assert_bitwise_equal(model(x), plain(x))


def test_the_order_of_two_conversions_does_not_matter():
    x, results = torch.randn(7, 48), []
    for first in ("mx", "float8"):
        torch.manual_seed(0)
        model = Model()
        for kind in (first, "float8" if first == "mx" else "mx"):
            if kind == "mx":
                convert_to_mx_training(model, "mxfp8", module_filter_fn=lambda _, fqn: fqn == "up")
            else:
                config = Float8LinearConfig.from_recipe_name("rowwise")
                convert_to_float8_training(model, config=config, module_filter_fn=lambda _, fqn: fqn == "down")
        assert type(model.up) is MXLinear
        assert type(model.down) is Float8Linear
        results.append(gradients(model, x))
    for one, other in zip(*results, strict=True):
        assert_bitwise_equal(one, other)


def test_converting_again_changes_the_recipe():
    model = build("mxfp8")
    up = model.up
    build_again = convert_to_mx_training(model, "mxfp8", module_filter_fn=lambda _, fqn: fqn != "head")
    assert build_again.up is up
    convert_to_mx_training(model, "mxfp4", module_filter_fn=lambda _, fqn: fqn != "head")
    assert model.up.recipe == RECIPES["mxfp4"]
    convert_to_float8_training(model)
    assert type(model.up) is Float8Linear


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match="MX training: converted none of the model's 3 linear layers"):
        convert_to_mx_training(Model(), module_filter_fn=lambda *_: False)
    with pytest.raises(ValueError, match=r"found no nn\.Linear"):
        convert_to_mx_training(nn.ReLU())
    for recipe in ("float8_rowwise", "mxfp8_fast"):
        with pytest.raises(ValueError, match=r"want one of.*mxfp8, mxfp8_gw_hp, mxfp4"):
            convert_to_mx_training(Model(), recipe)
    with pytest.raises(TypeError, match="want the name of a recipe"):
        convert_to_mx_training(Model(), Float8LinearConfig())


@pytest.mark.parametrize("recipe", MX_RECIPES)
def test_checkpointing_repeats_the_bits(recipe: str):
    """Noise of stochastic rounding included: it belongs to the gradient, and a repeated forward draws none."""
    model, x = build(recipe), torch.randn(32, 48)
    want = gradients(model, x)
    for context in ({}, {"context_fn": save_products()}):
        wrapped = copy.deepcopy(model)
        whole = wrapped.forward
        wrapped.forward = lambda x, whole=whole, context=context: checkpoint(whole, x, use_reentrant=False, **context)
        for got, expected in zip(gradients(wrapped, x), want, strict=True):
            assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("save_for_backward", ["high_precision", "quantized"])
@pytest.mark.parametrize("recipe", MX_RECIPES)
def test_what_is_kept_for_backward_does_not_change_the_bits(recipe: str, save_for_backward: str):
    x = torch.randn(37, 48)
    want = gradients(build(recipe), x)
    got = gradients(build(MXLinearConfig(recipe=recipe, save_for_backward=save_for_backward)), x)
    for one, other in zip(got, want, strict=True):
        assert_bitwise_equal(one, other)


def test_gradients_of_4_bits_differ_between_steps_but_not_between_repetitions():
    model, x = build("mxfp4"), torch.randn(64, 48)
    first = gradients(model, x)
    for one, other in zip(gradients(model, x), first, strict=True):
        assert_bitwise_equal(one, other)
    scaled = gradients(model, 2 * x)  # other gradients, other noise
    assert sqnr(4 * first[2], scaled[2]) < 40


@pytest.mark.parametrize("recipe", MX_RECIPES)
def test_compiled_as_eager(recipe: str):
    model, x = build(recipe), torch.randn(16, 48)
    want = gradients(model, x)
    torch._dynamo.reset()
    got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    for one, other in zip(got, want, strict=True):
        assert sqnr(other, one) > 100


def test_mxfp8linear_takes_the_arguments_that_users_write():
    layer = MXFP8Linear(48, 32, bias=True, wgrad_with_hp=True, kernel_preference=KernelPreference.EMULATED)
    assert layer.recipe == RECIPES["mxfp8_gw_hp"]
    assert layer.emulate
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(5, 48)
    with torch.no_grad():
        layer.bias.fill_(100.0)
    assert bool((layer(x) > 90).all())  # the bias counts
    layer(x).sum().backward()
    assert_bitwise_equal(layer.bias.grad, torch.full((32,), 5.0))
    floor = MXFP8Linear(48, 32, scale_calculation_mode=ScaleCalculationMode.FLOOR)
    assert floor.recipe.output.lhs.scale.name == "e8m0_floor"
    assert floor.recipe.grad_weight.rhs.scale.name == "e8m0_floor"
    assert "e4m3fn/e8m0_floor/1x32" in repr(floor)


def test_training_configurations_mean_what_they_are_named():
    recipes = MXFP8TrainingRecipe
    assert MXFP8TrainingOpConfig.from_recipe(recipes.MXFP8_RCEIL) == MXFP8TrainingOpConfig()
    with_hp = MXFP8TrainingOpConfig.from_recipe(recipes.MXFP8_RCEIL_WGRAD_WITH_HP)
    assert with_hp.to_linear_config().to_recipe() == RECIPES["mxfp8_gw_hp"]
    emulated = MXFP8TrainingOpConfig.from_recipe(recipes.MXFP8_EMULATED_RCEIL)
    assert emulated.to_linear_config().emulate
    assert emulated.to_linear_config().to_recipe() == RECIPES["mxfp8"]
    assert hash(MXFP8TrainingOpConfig()) == hash(MXFP8TrainingOpConfig())
    assert Float8TrainingOpConfig.from_recipe(Float8TrainingRecipe.FP8_ROWWISE) == Float8TrainingOpConfig()
    assert Float8TrainingOpConfig().to_linear_config() == Float8LinearConfig.from_recipe_name("rowwise")
    with pytest.raises(ValueError, match="Unsupported MXFP8 recipe"):
        MXFP8TrainingOpConfig.from_recipe(Float8TrainingRecipe.FP8_ROWWISE)
    with pytest.raises(ValueError, match="Unsupported FP8 recipe"):
        Float8TrainingOpConfig.from_recipe(recipes.MXFP8_RCEIL)
    with pytest.raises(ValueError, match="float8_dtype"):
        Float8TrainingOpConfig(float8_dtype=torch.float8_e5m2)


@pytest.mark.parametrize(
    ("enum", "values"),
    [
        (ScaleCalculationMode, {"FLOOR": "floor", "RCEIL": "rceil", "CEIL": "ceil", "EVEN": "even"}),
        (Float8TrainingRecipe, {"FP8_ROWWISE": "fp8_rowwise"}),
        (
            MXFP8TrainingRecipe,
            {
                "MXFP8_RCEIL": "mxfp8_rceil",
                "MXFP8_RCEIL_WGRAD_WITH_HP": "mxfp8_rceil_wgrad_with_hp",
                "MXFP8_EMULATED_RCEIL": "mxfp8_emulated_rceil",
            },
        ),
    ],
)
def test_enums_have_the_names_that_users_write(enum: type[Enum], values: dict[str, str]):
    assert {member.name: member.value for member in enum} == values


def test_a_float8_configuration_does_not_name_mx_recipes():
    with pytest.raises(ValueError, match="convert_to_mx_training"):
        Float8LinearConfig.from_recipe_name("mxfp8")
    from aotrain.nn.gathered_weight import planes_of

    with pytest.raises(ValueError, match="gathers in high precision"):
        planes_of(RECIPES["mxfp8"])
