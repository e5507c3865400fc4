"""Layers that follow each other with the same input quantize it once; nothing else ever shares."""

import dataclasses
import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from aotrain.nn import Float8LinearConfig, convert_to_float8_training, input_casts
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
from aotrain.testing import assert_bitwise_equal


class Attention(nn.Module):
    """q, k and v of one input, and a product of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 48, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        return self.q(h) + self.k(h) * self.v(h)


def build(recipe: str, save_for_backward: str = "high_precision") -> Attention:
    torch.manual_seed(0)
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe), save_for_backward=save_for_backward, cache_weight_casts=False
    )
    return convert_to_float8_training(Attention(), config=config)


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the shape of each operand that is quantized, the transposition of it in the same pass not counted."""
    seen: list[tuple[int, ...]] = []
    module = import_module("aotrain.ops.scaled_linear")
    for name in ("scaled_cast", "scaled_cast_both"):
        original = getattr(module, name)

        def counted(x: torch.Tensor, *scalings: Any, original: Any = original, **options: Any) -> Any:
            seen.append(tuple(x.shape))
            return original(x, *scalings, **options)

        monkeypatch.setattr(module, name, counted)
    return seen


@pytest.mark.parametrize("save_for_backward", SAVE_FOR_BACKWARD)
@pytest.mark.parametrize("recipe", FLOAT8_LINEAR_RECIPES)
def test_three_layers_cast_their_input_once_with_the_same_bits(
    casts: list[tuple[int, ...]], recipe: str, save_for_backward: str, monkeypatch: pytest.MonkeyPatch
):
    results = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(import_module("aotrain.nn.float8_linear"), "SharedInputCasts", lambda _: cast_operand)
        model = build(recipe, save_for_backward)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        casts.clear()
        y = model(x)
        assert casts.count((32, 64)) == (1 if shared else 3)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(param.grad for param in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert_bitwise_equal(one, other)


cast_operand = import_module("aotrain.ops").cast_operand


def test_a_changed_input_is_cast_again():
    model = build("rowwise")
    x = torch.randn(16, 64)
    with torch.no_grad():
        model.q(x)
        x.mul_(-3)
        assert_bitwise_equal(model.q(x), model.q(x.clone()))


def test_copies_go_with_the_next_input_and_with_backward():
    model = build("rowwise")
    x = torch.randn(16, 64, requires_grad=True)
    y = model(x)
    held = [weakref.ref(q.data) for q in input_casts._last.casts.values()]
    assert held
    y.sum().backward()
    assert not input_casts._last.casts
    assert all(ref() is None for ref in held)


def test_inference_mode_has_no_versions_and_shares_nothing():
    with torch.inference_mode():
        model, x = build("rowwise"), torch.randn(16, 64)
        want = build("rowwise")
        assert_bitwise_equal(model(x), want(x.clone()))
