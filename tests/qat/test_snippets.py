"""Usage as the guides of this field write it, with only the import changed: it runs, trains and converts."""

import pytest
import torch
from torch import nn

from tests.qat.models import Model, tokens

# As users write them, so imports are where they write them.


def train_loop(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_base_configuration():
    from aotrain.qat import QATConfig
    from aotrain.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    model = Model()
    base_config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(base_config, step="prepare"))
    train_loop(model)
    trained = model(tokens())
    quantize_(model, QATConfig(base_config, step="convert"))
    assert torch.equal(model(tokens()), trained)


def test_own_configurations_then_quantize():
    from aotrain.qat import IntxFakeQuantizeConfig, QATConfig
    from aotrain.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    model = Model()
    activation_config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight_config = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(activation_config=activation_config, weight_config=weight_config, step="prepare"))
    train_loop(model)
    trained = model(tokens())
    quantize_(model, QATConfig(step="convert"))
    base_config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, base_config)
    assert torch.equal(model(tokens()), trained)


def test_embeddings_by_a_filter():
    from aotrain.qat import IntxFakeQuantizeConfig, QATConfig
    from aotrain.quantization import quantize_

    def filter_fn(module, fqn):
        return isinstance(module, torch.nn.Embedding)

    model = Model()
    weight_config = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(weight_config=weight_config, step="prepare"), filter_fn=filter_fn)
    train_loop(model)
    quantize_(model, QATConfig(step="convert"), filter_fn=filter_fn)
    assert type(model.embed) is nn.Embedding


def test_quantizer_of_two_steps():
    from aotrain.qat import Int8DynActInt4WeightQATQuantizer

    model = Model()
    qat_quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    model = qat_quantizer.prepare(model)
    train_loop(model)
    trained = model(tokens())
    model = qat_quantizer.convert(model)
    assert torch.equal(model(tokens()), trained)


def test_quantizers_composed():
    from aotrain.qat import (
        ComposableQATQuantizer,
        Int4WeightOnlyEmbeddingQATQuantizer,
        Int8DynActInt4WeightQATQuantizer,
    )

    my_quantizer = ComposableQATQuantizer(
        [Int8DynActInt4WeightQATQuantizer(groupsize=32), Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)]
    )
    model = my_quantizer.prepare(Model())
    train_loop(model)
    my_quantizer.convert(model)


def test_submodules_that_others_import_from():
    from aotrain.qat.api import FakeQuantizeConfig, QATConfig
    from aotrain.qat.embedding import FakeQuantizedEmbedding, Int4WeightOnlyQATEmbedding
    from aotrain.qat.fake_quantize_config import (
        Float8FakeQuantizeConfig,
        Int4WeightFakeQuantizeConfig,
        IntxFakeQuantizeConfig,
        _infer_fake_quantize_configs,
    )
    from aotrain.qat.fake_quantizer import FakeQuantizer
    from aotrain.qat.linear import FakeQuantizedLinear, disable_linear_fake_quant, enable_linear_fake_quant

    assert all(
        each is not None
        for each in (
            *(FakeQuantizeConfig, QATConfig, FakeQuantizedEmbedding, Int4WeightOnlyQATEmbedding),
            *(Float8FakeQuantizeConfig, Int4WeightFakeQuantizeConfig, IntxFakeQuantizeConfig, FakeQuantizer),
            *(FakeQuantizedLinear, disable_linear_fake_quant, enable_linear_fake_quant, _infer_fake_quantize_configs),
        )
    )


@pytest.mark.parametrize("scheme", ["int8-int4", "fp8-fp8", "int4", "int8", "cactus"])
def test_schemes_of_unsloth(scheme: str):
    """Its filters and configurations (the group of 128 reduced to this model's width), and its calls of quantizers."""
    from aotrain.qat import QATConfig
    from aotrain.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerRow,
        quantize_,
    )

    per_channel = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    wide = lambda m, _: isinstance(m, nn.Linear) and m.in_features >= 64  # noqa: E731
    in_groups = lambda m, _: isinstance(m, nn.Linear) and m.in_features % 32 == 0  # noqa: E731
    pairs = {
        "int8-int4": [
            (per_channel, lambda m, _: isinstance(m, nn.Embedding)),
            (
                Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
                None,
            ),
        ],
        "fp8-fp8": [(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), None)],
        "int4": [(Int4WeightOnlyConfig(group_size=64), wide)],
        "int8": [(per_channel, None)],
        "cactus": [(IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerGroup(32)), in_groups)],
    }[scheme]
    model = Model()
    for base, filter_fn in pairs:
        quantize_(model, QATConfig(base, step="prepare"), filter_fn=filter_fn)
    layer = model.block[0]
    with torch.no_grad():
        weight, x = layer.weight_fake_quantizer(layer.weight), torch.randn(3, 64)
        if getattr(layer, "activation_fake_quantizer", None) is not None:
            x = layer.activation_fake_quantizer(x)
    assert torch.isfinite(x @ weight.t()).all()
    train_loop(model)
    trained = model(tokens())
    for base, filter_fn in pairs:
        quantize_(model, QATConfig(base, step="convert"), filter_fn=filter_fn)
    assert torch.equal(model(tokens()), trained)


def test_switch_of_axolotl():
    from aotrain.qat import Int4WeightFakeQuantizeConfig, QATConfig
    from aotrain.qat.embedding import FakeQuantizedEmbedding
    from aotrain.qat.linear import FakeQuantizedLinear
    from aotrain.quantization import quantize_

    model = Model()
    config = QATConfig(weight_config=Int4WeightFakeQuantizeConfig(group_size=32, activation_dtype=torch.bfloat16))
    quantize_(model, config)
    quantize_(model, config, filter_fn=lambda m, _: isinstance(m, torch.nn.Embedding))

    def toggle(mod: nn.Module, enable: bool) -> None:
        if isinstance(mod, FakeQuantizedLinear | FakeQuantizedEmbedding):
            if hasattr(mod, "activation_fake_quantizer") and mod.activation_fake_quantizer is not None:
                mod.activation_fake_quantizer.enabled = enable
            mod.weight_fake_quantizer.enabled = enable

    quantized = model(tokens())
    model.apply(lambda mod: toggle(mod, False))
    assert torch.equal(model(tokens()), Model()(tokens()))
    model.apply(lambda mod: toggle(mod, True))
    assert torch.equal(model(tokens()), quantized)
