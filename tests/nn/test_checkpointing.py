"""Selective checkpointing of low-precision blocks: the same bits, products computed once, casts twice."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aotrain.nn import Float8LinearConfig, convert_moe_training, convert_to_float8_training
from aotrain.nn.checkpointing import save_products
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
from aotrain.testing import assert_bitwise_equal
from tests.nn.experts import Experts, rows


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def block(recipe: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)
    ).bfloat16()
    return convert_to_float8_training(layers, config=Float8LinearConfig.from_recipe_name(recipe))


def run(recipe: str, context_fn: Any) -> tuple[list[torch.Tensor], Counter[str]]:
    layers = block(recipe)
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    with Count() as count:
        if context_fn is None:
            layers(x).square().sum().backward()
        else:
            checkpoint(layers, x, use_reentrant=False, context_fn=context_fn).square().sum().backward()
    return [x.grad, *(param.grad for param in layers.parameters())], count.calls


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("recipe", FLOAT8_LINEAR_RECIPES)
def test_same_gradients_and_no_product_twice(recipe: str, every: int):
    plain, without = run(recipe, None)
    kept, calls = run(recipe, save_products(every))
    for got, want in zip(kept, plain, strict=True):
        assert_bitwise_equal(got, want)
    product, cast = "aotrain.scaled_mm.default", "aotrain.scaled_cast.default"
    # Two products of the forward; every second one is repeated where asked for.
    assert calls[product] - without[product] == (0 if every == 1 else 1)
    assert calls[cast] > without[cast]
    assert calls["aten.gelu.default"] == 2 * without["aten.gelu.default"]


class Gated(torch.nn.Module):
    """Two layers of one input, which share its codes where nothing is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(32, 64, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x) * self.up(x)


@pytest.mark.parametrize("save_for_backward", SAVE_FOR_BACKWARD)
@pytest.mark.parametrize("context_fn", [None, save_products()], ids=["full", "selective"])
def test_layers_that_share_an_input_inside_and_outside_of_a_region(context_fn: Any, save_for_backward: str):
    torch.manual_seed(0)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), save_for_backward=save_for_backward)
    layers = convert_to_float8_training(Gated(), config=config)
    x = torch.randn(16, 32)
    grads = []
    for region in (False, True, True):
        inside = x.clone().requires_grad_()
        # The layer before the region has the region's input: its codes are at hand in the forward only.
        y = layers.gate(inside).sum()
        options = {"context_fn": context_fn} if context_fn is not None else {}
        y = y + (checkpoint(layers, inside, use_reentrant=False, **options) if region else layers(inside)).sum()
        y.backward()
        grads.append([inside.grad, layers.gate.weight.grad, layers.up.weight.grad])
        layers.zero_grad()
    for got in grads[1:]:
        for one, other in zip(got, grads[0], strict=True):
            assert_bitwise_equal(one, other)


def test_a_number_of_products_below_one():
    with pytest.raises(ValueError, match="got every=0; want 1"):
        save_products(0)


@pytest.mark.parametrize(
    ("recipe", "product"),
    [
        (None, "aten._grouped_mm.default"),
        ("float8_rowwise", "aotrain.scaled_grouped_mm.default"),
        ("nvfp4", "aotrain.nvfp4_grouped_mm.default"),
    ],
)
def test_grouped_products_of_experts_are_kept(recipe: str | None, product: str):
    experts, (x, offs) = Experts(), rows()
    if recipe is not None:
        convert_moe_training(experts, recipe)
    results = []
    for context_fn in (None, save_products()):
        experts.zero_grad()
        with Count() as count:
            if context_fn is None:
                out = experts(x, offs)
            else:
                out = checkpoint(experts, x, offs, use_reentrant=False, context_fn=context_fn)
            forward = count.calls[product]
            out.square().sum().backward()
        results.append(([param.grad for param in experts.parameters()], forward, count.calls[product]))
    (plain, *without), (kept, *with_checkpoint) = results
    assert without == with_checkpoint
    assert without[0] == 2
    for got, want in zip(kept, plain, strict=True):
        assert_bitwise_equal(got, want)
