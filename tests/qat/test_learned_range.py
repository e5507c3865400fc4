"""Range learning: LSQ's gradients, parameters in the state_dict, and what must happen before training."""

import pytest
import torch

from aotrain.qat import (
    FakeQuantizedLinear,
    IntxFakeQuantizeConfig,
    IntxFakeQuantizer,
    initialize_fake_quantizers,
)
from tests.qat.models import randn


def config(dtype: torch.dtype = torch.int4, symmetric: bool = True, **arguments) -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(
        dtype, group_size=32, is_symmetric=symmetric, is_dynamic=False, range_learning=True, **arguments
    )


def layer(weight_config: IntxFakeQuantizeConfig) -> FakeQuantizedLinear:
    torch.manual_seed(0)
    return FakeQuantizedLinear(64, 16, bias=True, weight_config=weight_config)


def by_autograd(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    """The definition, with torch's own derivatives of everything but rounding."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + (tensor.round() - tensor).detach()

    blocks = x.unflatten(-1, (-1, 32))
    scale, zero_point = scale[..., None], rounded(zero_point)[..., None]
    codes = (rounded(blocks / scale) + zero_point).clamp(lo, hi)
    return ((codes - zero_point) * scale).reshape(x.shape)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_lsq(symmetric: bool):
    quantizer = IntxFakeQuantizer(config(symmetric=symmetric))
    quantizer._initialized = True
    x = randn(8, 64).requires_grad_()
    quantizer(x)
    with torch.no_grad():  # so that elements saturate on both sides
        quantizer.scale.mul_(0.6)
    scale = quantizer.scale.detach().clone().requires_grad_()
    zero_point = torch.zeros_like(scale) if symmetric else quantizer.zero_point.detach().clone()
    zero_point.requires_grad_()
    want = by_autograd(x, scale, zero_point, -8, 7)
    values = quantizer(x)
    assert torch.allclose(values, want, rtol=1e-6, atol=1e-6)
    grad = randn(8, 64, seed=1)
    want_x, want_scale, want_zero_point = torch.autograd.grad(want, (x, scale, zero_point), grad)
    parameters = list(quantizer.parameters())
    got_x, *got = torch.autograd.grad(values, (x, *parameters), grad)
    factor = (32 * 7) ** -0.5
    assert torch.equal(got_x == 0, want_x == 0)
    assert torch.allclose(got_x, want_x, rtol=4 * torch.finfo(torch.float32).eps, atol=0)  # theirs is times s / s
    assert 0 < (got_x == 0).float().mean() < 0.5
    for mine, theirs in zip(got, (want_scale, want_zero_point), strict=False):
        assert torch.allclose(mine, theirs * factor, rtol=1e-4, atol=1e-5)
    assert len(got) == (1 if symmetric else 2)


def test_the_first_values_are_those_of_dynamic_scales():
    quantizer = IntxFakeQuantizer(config())
    quantizer._initialized = True
    x = randn(8, 64)
    assert torch.equal(quantizer(x), IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32))(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_parameters_that_train_and_travel(symmetric: bool):
    """An int32 zero point cannot be a parameter: others raise; here it trains in float32."""
    model = torch.nn.Sequential(layer(config(symmetric=symmetric)))
    x = randn(32, 64)
    with pytest.raises(ValueError, match=r"Please call `aotrain.qat.initialize_fake_quantizers` before"):
        model(x)
    initialize_fake_quantizers(model, (x,))
    names = {"0.weight", "0.bias", "0.weight_fake_quantizer.scale"}
    assert set(model.state_dict()) == (names if symmetric else names | {"0.weight_fake_quantizer.zero_point"})
    target = x @ randn(64, 16, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(before["0.weight_fake_quantizer.scale"], model[0].weight_fake_quantizer.scale)

    fresh = torch.nn.Sequential(layer(config(symmetric=symmetric)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert {name for name, _ in fresh.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_an_unsigned_symmetric_range_is_loaded_with_its_center():
    one, other = (torch.nn.Sequential(layer(config(torch.uint4))) for _ in range(2))
    x = randn(3, 64)
    initialize_fake_quantizers(one, (x,))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_scale_that_fell_below_its_bound_comes_back():
    quantizer = IntxFakeQuantizer(config())
    quantizer._initialized = True
    x = randn(4, 64)
    quantizer(x)
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    values = quantizer(x)
    assert values.isfinite().all()
    (grad,) = torch.autograd.grad((values - x).square().sum(), quantizer.scale)
    assert (grad < 0).all()


def test_an_input_that_misses_a_layer_is_an_error():
    model = torch.nn.ModuleDict({"used": layer(config()), "unused": layer(config())})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match=r"inputs that do not reach unused.weight_fake_quantizer; want inputs"):
        initialize_fake_quantizers(model, (randn(2, 64),))


def test_switched_off_it_needs_no_range():
    one = layer(config())
    one.disable_fake_quant()
    x = randn(2, 64)
    assert torch.equal(one(x), torch.nn.functional.linear(x, one.weight, one.bias))
