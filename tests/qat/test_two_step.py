"""Two-step quantizers: which layers they take, what others set on them, and that conversion keeps every bit."""

import pytest
import torch
from torch import nn

from aotrain.qat import (
    ComposableQATQuantizer,
    FakeQuantizeConfig,
    FakeQuantizedLinear,
    FakeQuantizer,
    Float8ActInt4WeightQATQuantizer,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    TwoStepQuantizer,
)
from aotrain.qat.embedding import Int4WeightOnlyQATEmbedding
from aotrain.qat.linear import (
    Int4WeightOnlyQATLinear,
    Int8DynActInt4WeightQATLinear,
    disable_8da4w_fake_quant,
    enable_8da4w_fake_quant,
)
from aotrain.quantization import QuantizedEmbedding, QuantizedLinear
from tests.qat.models import Model, randn, tokens


def kinds(model: nn.Module) -> list[type]:
    return [type(layer) for layer in (model.embed, model.block[0], model.block[2], model.lm_head)]


@pytest.mark.parametrize(
    ("quantizer", "prepared", "converted"),
    [
        (
            Int8DynActInt4WeightQATQuantizer(groupsize=32),
            [nn.Embedding, *[Int8DynActInt4WeightQATLinear] * 3],
            [nn.Embedding, *[QuantizedLinear] * 3],
        ),
        (
            Int4WeightOnlyQATQuantizer(groupsize=32),
            [nn.Embedding, nn.Linear, *[Int4WeightOnlyQATLinear] * 2],
            [nn.Embedding, nn.Linear, *[QuantizedLinear] * 2],
        ),
        (
            Int4WeightOnlyEmbeddingQATQuantizer(group_size=64),
            [Int4WeightOnlyQATEmbedding, *[nn.Linear] * 3],
            [QuantizedEmbedding, *[nn.Linear] * 3],
        ),
        (
            Float8ActInt4WeightQATQuantizer(),
            [nn.Embedding, *[FakeQuantizedLinear] * 3],
            [nn.Embedding, *[QuantizedLinear] * 3],
        ),
        (
            Float8ActInt4WeightQATQuantizer(group_size=None),
            [nn.Embedding, *[FakeQuantizedLinear] * 3],
            [nn.Embedding, *[QuantizedLinear] * 3],
        ),
        (
            ComposableQATQuantizer(
                [Int8DynActInt4WeightQATQuantizer(groupsize=32), Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)]
            ),
            [Int4WeightOnlyQATEmbedding, *[Int8DynActInt4WeightQATLinear] * 3],
            [QuantizedEmbedding, *[QuantizedLinear] * 3],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_and_convert(quantizer: TwoStepQuantizer, prepared, converted, dtype: torch.dtype):
    model = Model(dtype=dtype)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert quantizer.prepare(model) is model
    assert kinds(model) == prepared
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    model(tokens()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want = model(tokens())
    assert quantizer.convert(model) is model
    assert kinds(model) == converted
    assert torch.equal(model(tokens()), want)
    with pytest.raises(ValueError, match="converted already"):
        quantizer.convert(model)


def test_what_torchtune_does():
    quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    quantizer.precision = torch.bfloat16
    assert quantizer.groupsize == 32
    activation, weight = quantizer.get_activation_fake_quantize_config(), quantizer.get_weight_fake_quantize_config()
    assert isinstance(activation, FakeQuantizeConfig)
    assert isinstance(weight, FakeQuantizeConfig)
    assert FakeQuantizer(weight)(randn(4, 64)).shape == (4, 64)
    assert (activation.zero_point_precision, activation.eps) == (torch.float32, torch.finfo(torch.float32).eps)
    model = quantizer.prepare(Model())
    plain = Model()
    model.apply(disable_8da4w_fake_quant)
    assert torch.equal(model(tokens()), plain(tokens()))
    model.apply(enable_8da4w_fake_quant)
    assert not torch.equal(model(tokens()), plain(tokens()))


def test_older_quantizers_have_their_configurations():
    """`get_weight_fake_quantize_config` of the float8 one is an AttributeError elsewhere."""
    quantizer = Float8ActInt4WeightQATQuantizer()
    assert quantizer.get_weight_fake_quantize_config().group_size == 64
    assert quantizer.get_activation_fake_quantize_config().dtype == torch.float8_e4m3fn
    assert Int4WeightOnlyQATQuantizer().get_activation_fake_quantize_config() is None
    assert Int4WeightOnlyQATQuantizer().get_weight_fake_quantize_config().dtype == torch.uint4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8DynActInt4WeightQATQuantizer(padding_allowed=True), "want False, and a groupsize that divides"),
        (lambda: Int4WeightOnlyQATQuantizer(groupsize=48), "groupsize=48, .* want 32, 64, 128 or 256"),
        (lambda: Int4WeightOnlyQATQuantizer(inner_k_tiles=3), "inner_k_tiles=3"),
        (lambda: Int4WeightOnlyQATQuantizer(scales_precision=torch.float32), "scales_precision=torch.float32"),
        (lambda: Int8DynActInt4WeightQATQuantizer().prepare(Model()), "found no layer to prepare among 3"),
        (lambda: Int4WeightOnlyEmbeddingQATQuantizer().prepare(Model()), "found no embedding to prepare"),
        (lambda: Int4WeightOnlyQATQuantizer().convert(Model()), "got a model without fake-quantized layers"),
    ],
)
def test_errors(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
