"""NVFP4 training of whole models: conversion beside the other formats' in any order, the tail in bfloat16, and back."""

import pytest
import torch
from torch import nn

from aotrain.nn import (
    Float8Linear,
    Float8LinearConfig,
    MXLinear,
    MXLinearConfig,
    NVFP4Linear,
    NVFP4TrainingConfig,
    conversion_report,
    convert_to_float8_training,
    convert_to_mx_training,
    keep_tail_layers,
    unconvert,
)
from aotrain.quantization import quantize_
from aotrain.testing import assert_bitwise_equal


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 33), nn.ReLU(), nn.Linear(33, 48)) for _ in range(8))
        self.head = nn.Linear(48, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def kinds(model: nn.Module) -> dict[str, type]:
    return {fqn: type(layer) for fqn, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = model(torch.randn(5, 48))
    y.square().sum().backward()
    return [y.detach(), *(param.grad.clone() for param in model.parameters())]


@pytest.mark.parametrize("recipe", ["nvfp4", NVFP4TrainingConfig(seed=3)], ids=["name", "configuration"])
def test_every_layer_is_that_of_the_configuration(recipe) -> None:
    config = NVFP4TrainingConfig() if isinstance(recipe, str) else recipe
    by_hand, model = Model(), Model()
    for block in by_hand.blocks:
        block[0], block[2] = NVFP4Linear.from_float(block[0], config), NVFP4Linear.from_float(block[2], config)
    parameters = dict(model.named_parameters())
    assert convert_to_mx_training(model, recipe, module_filter_fn=lambda _, fqn: fqn != "head") is model
    assert kinds(model) == kinds(by_hand)
    assert model.blocks[0][0].config == config
    assert all(parameters[name] is param for name, param in model.named_parameters())
    assert len(parameters) == len(list(model.named_parameters()))
    for got, want in zip(gradients(model), gradients(by_hand), strict=True):
        assert_bitwise_equal(got, want)
    report = conversion_report(model)
    assert report.summary() == "NVFP4 training: converted 16 layers, skipped 1 (1 rejected by the filter)"


def test_the_tail_stays_in_high_precision() -> None:
    model = Model()
    convert_to_mx_training(model, "nvfp4", module_filter_fn=keep_tail_layers(model))
    plain = [fqn for fqn, kind in kinds(model).items() if kind is nn.Linear]
    assert plain == ["blocks.6.0", "blocks.6.2", "blocks.7.0", "blocks.7.2", "head"]


def in_block(number: int):
    return lambda _, fqn: fqn.startswith(f"blocks.{number}.")


def conversions():
    return {
        "float8": lambda model: convert_to_float8_training(model, module_filter_fn=in_block(0)),
        "mx": lambda model: convert_to_mx_training(model, "mxfp4", module_filter_fn=in_block(1)),
        "nvfp4": lambda model: convert_to_mx_training(model, "nvfp4", module_filter_fn=in_block(2)),
    }


@pytest.mark.parametrize("order", [("nvfp4", "mx", "float8"), ("float8", "nvfp4", "mx")], ids="-".join)
def test_the_order_of_conversions_does_not_matter(order) -> None:
    model, other = Model(), Model()
    for name in order:
        conversions()[name](model)
    for name in ("mx", "float8", "nvfp4"):
        conversions()[name](other)
    assert kinds(model) == kinds(other)
    assert [type(block[0]) for block in model.blocks[:4]] == [Float8Linear, MXLinear, NVFP4Linear, nn.Linear]
    for got, want in zip(gradients(model), gradients(other), strict=True):
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize("last", ["float8", "mx", "nvfp4"])
def test_a_layer_is_what_the_last_conversion_made_it(last: str) -> None:
    """No attribute of an earlier conversion is left over, and nn.Linear comes back without any."""
    convert = {
        "float8": lambda model: convert_to_float8_training(model),
        "mx": lambda model: convert_to_mx_training(model, MXLinearConfig()),
        "nvfp4": lambda model: convert_to_mx_training(model, NVFP4TrainingConfig()),
    }
    fresh, model = Model(), Model()
    convert[last](fresh)
    for name in ("nvfp4", "float8", "mx", "nvfp4", last):
        convert[name](model)
    assert kinds(model) == kinds(fresh)
    assert vars(model.head).keys() == vars(fresh.head).keys()
    for got, want in zip(gradients(model), gradients(fresh), strict=True):
        assert_bitwise_equal(got, want)
    unconvert(model)
    assert set(kinds(model).values()) == {nn.Linear}
    assert vars(model.head).keys() == vars(Model().head).keys()


def test_weights_gathered_as_codes_become_ordinary_ones_again() -> None:
    """A float8 layer whose weight FSDP2 would gather in float8, converted anew: NVFP4 gathers in high precision."""
    model = convert_to_float8_training(Model(), config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    assert type(model.head.weight.data) is not torch.Tensor
    convert_to_mx_training(model, "nvfp4")
    assert type(model.head.weight.data) is torch.Tensor
    want = convert_to_mx_training(Model(), "nvfp4")
    for got, expected in zip(gradients(model), gradients(want), strict=True):
        assert_bitwise_equal(got, expected)


def test_converting_again_keeps_layers_of_an_equal_configuration() -> None:
    model = convert_to_mx_training(Model(), "nvfp4")
    head = model.head
    assert convert_to_mx_training(model, NVFP4TrainingConfig()).head is head
    assert convert_to_mx_training(model, NVFP4TrainingConfig(seed=1)).head is not head


def test_quantize_takes_the_configuration_and_the_filter() -> None:
    model = Model()
    quantize_(model, NVFP4TrainingConfig(), filter_fn=keep_tail_layers(model))
    assert [kind is NVFP4Linear for kind in kinds(model).values()] == [True] * 12 + [False] * 5


def test_a_layer_by_itself_is_returned() -> None:
    linear = nn.Linear(32, 16)
    layer = convert_to_mx_training(linear, "nvfp4")
    assert type(layer) is NVFP4Linear
    assert layer.weight is linear.weight
    assert type(unconvert(layer)) is nn.Linear


def test_errors_name_nvfp4_among_the_choices() -> None:
    for recipe in ("nvfp5", "float8_rowwise"):
        with pytest.raises(ValueError, match=r"want one of mxfp8, mxfp8_gw_hp, mxfp4, or .*nvfp4"):
            convert_to_mx_training(Model(), recipe)
    with pytest.raises(TypeError, match="NVFP4TrainingConfig"):
        convert_to_mx_training(Model(), Float8LinearConfig())
    with pytest.raises(ValueError, match="NVFP4 training: converted none"):
        convert_to_mx_training(Model(), "nvfp4", module_filter_fn=lambda *_: False)
