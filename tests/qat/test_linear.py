"""Fake-quantized linear layers: the layer by definition, what they share, what they keep, bias gradients, switches."""

import copy

import pytest
import torch

from aotrain.nn import Float8Linear, Float8LinearConfig
from aotrain.qat import (
    FakeQuantizedLinear,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    MXFakeQuantizeConfig,
    MXFakeQuantizedLinear,
    NVFP4FakeQuantizeConfig,
    NVFP4FakeQuantizedLinear,
    SchemeFakeQuantizeConfig,
)
from aotrain.qat.linear import (
    Int4WeightOnlyQATLinear,
    Int8DynActInt4WeightQATLinear,
    disable_4w_fake_quant,
    disable_8da4w_fake_quant,
    disable_linear_fake_quant,
    enable_4w_fake_quant,
    enable_8da4w_fake_quant,
    enable_linear_fake_quant,
)
from aotrain.quantization import SCHEMES, PerTensor
from tests.qat.models import randn

INT4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
PAIRS = (
    (None, INT4),
    (TOKENS, INT4),
    (TOKENS, None),
    (Float8FakeQuantizeConfig(), Float8FakeQuantizeConfig()),
    (Float8FakeQuantizeConfig(granularity=PerTensor()), Float8FakeQuantizeConfig(granularity=PerTensor())),
    (Float8FakeQuantizeConfig(), Int4WeightFakeQuantizeConfig(32)),
    (None, Int4WeightFakeQuantizeConfig(32, torch.bfloat16)),
    (MXFakeQuantizeConfig(), MXFakeQuantizeConfig()),
    (NVFP4FakeQuantizeConfig(), NVFP4FakeQuantizeConfig()),
    (None, SchemeFakeQuantizeConfig(SCHEMES["q4_0"].weight)),
)


def plain(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 48, dtype=dtype)


def made(activation, weight, dtype: torch.dtype = torch.float32) -> FakeQuantizedLinear:
    return FakeQuantizedLinear.from_linear(plain(dtype), activation, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_layer_is_a_product_of_fake_quantized_operands(pair, dtype: torch.dtype):
    layer = made(*pair, dtype)
    x = randn(2, 5, 64, dtype=dtype).requires_grad_()
    activation, weight = layer.activation_fake_quantizer, layer.weight_fake_quantizer
    want = torch.nn.functional.linear(
        x if activation is None else activation(x), layer.weight if weight is None else weight(layer.weight), layer.bias
    )
    output = layer(x)
    assert torch.equal(output, want)
    grad = randn(*output.shape, seed=1, dtype=dtype)
    operands = (x, layer.weight, layer.bias)
    for got, expected in zip(
        torch.autograd.grad(output, operands, grad), torch.autograd.grad(want, operands, grad), strict=True
    ):
        assert torch.equal(got, expected)


def test_saves_its_input_and_its_weight_alone():
    layer = made(TOKENS, INT4)
    x = randn(4, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        layer(x)
    assert saved == [x.data_ptr(), layer.weight.data_ptr()]


def test_parameters_hooks_and_keys_are_those_of_the_layer():
    linear = plain().eval()
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = FakeQuantizedLinear.from_linear(linear, TOKENS, INT4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not layer.training
    layer(randn(1, 64))
    assert calls == [1]
    back = layer.to_linear()
    assert type(back) is torch.nn.Linear
    assert back.weight is linear.weight
    assert not list(back.children())
    assert type(copy.deepcopy(layer)(randn(1, 64))) is torch.Tensor


def test_constructor_has_no_bias_by_default():
    layer = FakeQuantizedLinear(64, 48, activation_config=TOKENS, weight_config=INT4, dtype=torch.bfloat16)
    assert layer.bias is None
    assert layer.weight.dtype == torch.bfloat16


def test_meta_device():
    layer = FakeQuantizedLinear.from_linear(torch.nn.Linear(64, 48, device="meta"), TOKENS, INT4)
    assert layer.weight.is_meta
    assert layer.to_linear().weight is layer.weight
    layer.to_empty(device="cpu")
    torch.nn.init.normal_(layer.weight)
    assert layer(randn(3, 64)).shape == (3, 48)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"in_features \(48\) % group_size \(32\) must be == 0"):
        FakeQuantizedLinear(48, 8, weight_config=INT4)
    with pytest.raises(ValueError, match="a weight that its scheme cannot take: the last dimension"):
        FakeQuantizedLinear(40, 8, weight_config=SchemeFakeQuantizeConfig(SCHEMES["q4_0"].weight))
    for cls, config in (
        (MXFakeQuantizedLinear, MXFakeQuantizeConfig()),
        (NVFP4FakeQuantizedLinear, NVFP4FakeQuantizeConfig()),
    ):
        with pytest.raises(ValueError, match=rf"{cls.__name__} got activation_config=None; want"):
            cls(64, 48, weight_config=config)
        with pytest.raises(ValueError, match=rf"{cls.__name__} got weight_config=.*; want"):
            cls(64, 48, activation_config=config, weight_config=INT4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [(MXFakeQuantizedLinear, MXFakeQuantizeConfig()), (NVFP4FakeQuantizedLinear, NVFP4FakeQuantizeConfig())],
)
def test_block_formats_give_the_bias_its_gradient(cls, config):
    """Others return None for it: it never trains."""
    layer = cls.from_linear(plain(), config, config)
    assert layer.activation_config is config
    assert layer.weight_config is config
    output = layer(randn(6, 64))
    grad = randn(6, 48, seed=1)
    output.backward(grad)
    assert torch.equal(layer.bias.grad, grad.sum(0))
    assert type(layer.to_linear()) is torch.nn.Linear


def test_switches():
    layer = made(TOKENS, INT4)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    x = randn(3, 64)
    want = layer.to_linear()(x)
    model.apply(disable_linear_fake_quant)
    assert torch.equal(layer(x), want)
    assert not layer.weight_fake_quantizer.enabled
    model.apply(enable_linear_fake_quant)
    assert not torch.equal(layer(x), want)
    layer.weight_fake_quantizer.enabled = False  # one of them, as consumers do
    assert torch.equal(
        layer(x), torch.nn.functional.linear(layer.activation_fake_quantizer(x), layer.weight, layer.bias)
    )
    quantized = layer.activation_fake_quantizer(x)
    layer.activation_fake_quantizer.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(layer(x), torch.nn.functional.linear(2 * quantized, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("layer", "enable", "disable"),
    [
        (Int8DynActInt4WeightQATLinear(64, 48, groupsize=32), enable_8da4w_fake_quant, disable_8da4w_fake_quant),
        (
            Int4WeightOnlyQATLinear(64, 48, groupsize=32, precision=torch.float32),
            enable_4w_fake_quant,
            disable_4w_fake_quant,
        ),
    ],
)
def test_switches_of_the_older_classes(layer, enable, disable):
    """`enable_fake_quant` of the weight-only class is an AttributeError elsewhere."""
    x = randn(3, 64)
    on = layer(x)
    layer.apply(disable)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
    layer.apply(enable)
    assert torch.equal(layer(x), on)
    layer.disable_fake_quant()
    layer.enable_fake_quant()
    assert torch.equal(layer(x), on)


def test_weight_only_class_has_no_bias_and_bfloat16_scales():
    for arguments in ({"bias": True}, {"scales_precision": torch.float32}):
        with pytest.raises(ValueError, match=r"want no bias and torch.bfloat16"):
            Int4WeightOnlyQATLinear(64, 48, **arguments)


def test_layers_in_low_precision_are_refused_elsewhere():
    from aotrain.qat.swap import fake_quantized

    layer = Float8Linear.from_float(plain(), Float8LinearConfig())
    with pytest.raises(ValueError, match=r"it trains in low precision; unconvert\(\) the model"):
        fake_quantized(layer, None, INT4)
