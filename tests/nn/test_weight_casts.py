"""The copies of a weight are kept exactly as long as they are right, and only where they are used again."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from aotrain.nn import Float8Linear, Float8LinearConfig, weight_casts
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one, "transposed", for each time that a weight is quantized from high precision."""
    casts: list[bool] = []
    original = weight_casts.cast_weight

    def cast_weight(weight: torch.Tensor, scaling: object, *, transposed: bool) -> object:
        casts.append(transposed)
        return original(weight, scaling, transposed=transposed)

    monkeypatch.setattr(weight_casts, "cast_weight", cast_weight)
    return casts


def layer(recipe: str = "rowwise", **options: object) -> Float8Linear:
    config = Float8LinearConfig.from_recipe_name(recipe)
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return Float8Linear(64, 48, bias=False, config=Float8LinearConfig(**{**values, **options}))


def step(linear: Float8Linear, passes: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    total = torch.zeros(())
    for _ in range(passes):
        loss = linear(torch.randn(32, 64, requires_grad=True)).square().sum()
        loss.backward()
        total = total + loss.detach()
    return total


def test_a_layer_used_once_per_step_keeps_nothing(counted: list[bool]):
    linear = layer()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    for _ in range(3):
        step(linear)
        optimizer.step()
        assert not linear.weight_casts._casts
    assert counted == [False, True] * 3


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_accumulation_casts_once_per_step_with_the_same_bits(counted: list[bool], name: str):
    cached, plain = layer(name), layer(name, cache_weight_casts=False)
    plain.load_state_dict(cached.state_dict())
    optimizers = [torch.optim.AdamW(linear.parameters(), lr=1e-2, fused=True) for linear in (cached, plain)]
    for number in range(3):
        counted.clear()
        assert_bitwise_equal(step(cached, passes=4), step(plain, passes=4))
        assert_bitwise_equal(cached.weight.grad, plain.weight.grad)
        # The first step finds out in its second pass. One cast serves both products where the scales are the same.
        shared = RECIPES[name].output.rhs == RECIPES[name].grad_input.rhs and name != "float8_rowwise"
        shared = shared and name != "int8_rowwise"
        assert len(counted) == (4 if number == 0 and not shared else 3 if number == 0 else 1 if shared else 2)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_bitwise_equal(cached.weight.detach(), plain.weight.detach())


def in_place(linear: Float8Linear) -> None:
    with torch.no_grad():
        linear.weight.mul_(2)


def replaced(linear: Float8Linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


def new_data(linear: Float8Linear) -> None:
    linear.weight.data = linear.weight.detach() * 2


def loaded(linear: Float8Linear) -> None:
    linear.load_state_dict({"weight": linear.weight.detach() * 2})


def stepped(linear: Float8Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True).step()


def through_data(linear: Float8Linear) -> None:
    linear.weight.data.mul_(2)
    linear.weight_casts.clear()


@pytest.mark.parametrize("change", [in_place, replaced, new_data, loaded, stepped, through_data])
def test_every_change_of_the_weight_is_seen(change: Callable[[Float8Linear], None]):
    linear = layer()
    x = torch.randn(8, 64)
    for _ in range(3):
        linear(x)
    assert linear.weight_casts._casts
    change(linear)
    fresh = layer(cache_weight_casts=False)
    fresh.weight = linear.weight
    assert_bitwise_equal(linear(x), fresh(x))


def test_recomputation_in_backward_is_no_second_use(counted: list[bool]):
    linear = layer()
    x = torch.randn(8, 64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(linear, x, use_reentrant=False).sum().backward()
    assert counted == [False, False, True]
    assert not linear.weight_casts._casts


def test_copies_of_a_module_have_empty_caches():
    linear = layer()
    for _ in range(2):
        linear(torch.randn(4, 64))
    assert linear.weight_casts._casts
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert not other.weight_casts._casts
        assert_bitwise_equal(other(torch.ones(4, 64)), linear(torch.ones(4, 64)))
