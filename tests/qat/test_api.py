"""QATConfig through quantize_: messages in their order, what is prepared, and that conversion keeps every bit."""

import pytest
import torch
from torch import nn

import aotrain
from aotrain.qat import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    Float8FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    MXFakeQuantizedLinear,
    NVFP4FakeQuantizedLinear,
    QATConfig,
    QATStep,
    from_intx_quantization_aware_training,
    initialize_fake_quantizers,
    intx_quantization_aware_training,
)
from aotrain.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_,
)
from tests.qat.models import Model, tokens

INT4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)
TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
BASE = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
WEIGHT_ONLY = IntxWeightOnlyConfig(torch.int4, PerGroup(32))


def is_embedding(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Embedding)


def kinds(model: nn.Module) -> list[type]:
    return [type(layer) for layer in (model.embed, model.block[0], model.block[2], model.lm_head)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_config": BASE, "step": "train"}, r"`step` must be one of \['prepare', 'convert'\]"),
        ({"base_config": BASE, "activation_config": TOKENS}, "Cannot specify both `base_config` and `activation_conf"),
        ({"base_config": BASE, "weight_config": INT4}, "Cannot specify both `base_config` and `weight_config`"),
        ({}, "Must specify `base_config`, `activation_config`, or `weight_config` in the prepare step"),
        (
            {"weight_config": INT4, "step": "convert"},
            "Cannot specify `weight_config` or `activation_config` in the convert step",
        ),
        ({"base_config": INT4}, "IntxFakeQuantizeConfig was passed as `base_config`. Did you mean to do the following"),
    ],
)
def test_what_the_configuration_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        QATConfig(**arguments)


def test_steps_are_names_in_any_case():
    assert aotrain.QATConfig is QATConfig
    for step in ("CONVERT", QATStep.CONVERT, "convert"):
        assert QATConfig(step=step).step == "convert" == QATStep.CONVERT
    assert QATConfig(BASE).step == "prepare"
    assert repr(QATConfig(weight_config=INT4)) == f"QATConfig(weight_config={INT4!r}, step='prepare')"


def test_prepare_takes_linear_layers_or_what_the_filter_says():
    model = Model()
    weights = list(model.parameters())
    keys = list(model.state_dict())
    quantize_(model, QATConfig(BASE, step="prepare"))
    assert kinds(model) == [nn.Embedding, *[FakeQuantizedLinear] * 3]
    quantize_(model, QATConfig(weight_config=INT4), filter_fn=is_embedding)
    assert kinds(model)[0] is FakeQuantizedEmbedding
    assert all(one is other for one, other in zip(weights, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    model(tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    quantize_(model, QATConfig(step="convert"))
    assert kinds(model) == [FakeQuantizedEmbedding, *[nn.Linear] * 3]
    quantize_(model, QATConfig(step="convert"), filter_fn=is_embedding)
    assert kinds(model)[0] is nn.Embedding
    assert all(one is other for one, other in zip(weights, model.parameters(), strict=True))


def test_block_formats_have_layers_of_their_own():
    for base, cls in (
        (MXDynamicActivationMXWeightConfig(), MXFakeQuantizedLinear),
        (NVFP4DynamicActivationNVFP4WeightConfig(), NVFP4FakeQuantizedLinear),
    ):
        model = Model()
        quantize_(model, QATConfig(base))
        assert kinds(model)[1:] == [cls] * 3


def test_one_configuration_per_layer():
    model = Model()
    quantize_(model, FqnToConfig({r"re:block\..*": QATConfig(BASE), "embed": QATConfig(WEIGHT_ONLY)}), filter_fn=None)
    assert kinds(model) == [FakeQuantizedEmbedding, FakeQuantizedLinear, FakeQuantizedLinear, nn.Linear]
    prepared = model(tokens())
    convert = {
        r"re:block\..*": QATConfig(BASE, step="convert"),
        "embed": QATConfig(WEIGHT_ONLY, step="convert"),
    }
    quantize_(model, FqnToConfig(convert), filter_fn=None)
    assert torch.equal(model(tokens()), prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "base",
    [
        *(Int8DynamicActivationIntxWeightConfig(getattr(torch, f"int{bits}"), PerGroup(32)) for bits in (2, 4, 8)),
        Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)),
        *(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32)) for bits in (2, 3, 4)),
        IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
        Int4WeightOnlyConfig(32),
        Int8WeightOnlyConfig(),
        Int8DynamicActivationInt8WeightConfig(),
        Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
        Float8WeightOnlyConfig(),
        NVFP4WeightOnlyConfig(),
        Float8DynamicActivationFloat8WeightConfig(),
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        MXDynamicActivationMXWeightConfig(),
        NVFP4DynamicActivationNVFP4WeightConfig(),
        NVFP4DynamicActivationNVFP4WeightConfig(use_dynamic_per_tensor_scale=False),
    ],
    ids=str,
)
def test_converted_is_prepared_to_the_last_bit(base, dtype: torch.dtype):
    model = Model(dtype=dtype)
    with_embedding = isinstance(base, IntxWeightOnlyConfig | Int8WeightOnlyConfig | Int4WeightOnlyConfig)
    filters = [None, is_embedding] if with_embedding else [None]
    for filter_fn in filters:
        quantize_(model, QATConfig(base), filter_fn=filter_fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens()).square().mean().backward()
    optimizer.step()
    prepared = model(tokens())
    plain = Model(dtype=dtype)
    plain.load_state_dict(model.state_dict())
    for filter_fn in filters:
        quantize_(model, QATConfig(base, step="convert"), filter_fn=filter_fn)
        quantize_(plain, base, filter_fn=filter_fn)
    assert kinds(model)[1:] == [QuantizedLinear] * 3
    assert (kinds(model)[0] is QuantizedEmbedding) == with_embedding
    assert torch.equal(model(tokens()), prepared)
    assert torch.equal(plain(tokens()), prepared)


def test_wide_groups_of_float8_activations():
    layers = nn.Sequential(nn.Linear(256, 64))
    base = Float8DynamicActivationInt4WeightConfig()
    quantize_(layers, QATConfig(base))
    x = torch.randn(3, 4, 256)
    prepared = layers(x)
    quantize_(layers, QATConfig(base, step="convert"))
    assert torch.equal(layers(x), prepared)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_ranges_are_converted_as_they_were_trained(symmetric: bool, dtype: torch.dtype):
    learned = IntxFakeQuantizeConfig(
        torch.int4, group_size=32, is_symmetric=symmetric, is_dynamic=False, range_learning=True
    )
    model = Model(dtype=dtype)
    quantize_(model, QATConfig(weight_config=learned))
    initialize_fake_quantizers(model, (tokens(),))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens()).square().mean().backward()
        optimizer.step()
    prepared = model(tokens())
    if symmetric:
        base = IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=torch.float32)
        quantize_(model, QATConfig(base, step="convert"))
    else:
        aotrain.qat.convert_qat(model)
    assert torch.equal(model(tokens()), prepared)


def test_another_base_configuration_than_trained_is_said():
    model = Model()
    quantize_(model, QATConfig(weight_config=Float8FakeQuantizeConfig()))
    with pytest.warns(UserWarning, match=r"converts 'block.0' by .* training has not seen these numbers"):
        quantize_(model, QATConfig(WEIGHT_ONLY, step="convert"))


def test_twice_or_not_at_all_is_an_error():
    model = Model()
    with pytest.raises(ValueError, match="a model without fake-quantized layers; prepare and train it first"):
        quantize_(model, QATConfig(BASE, step="convert"))
    quantize_(model, QATConfig(BASE))
    with pytest.raises(ValueError, match=r"'block.0': Module of type 'FakeQuantizedLinear' is prepared already"):
        quantize_(model, QATConfig(BASE))
    quantize_(model, QATConfig(BASE, step="convert"))
    with pytest.raises(ValueError, match="converted already"):
        quantize_(model, QATConfig(BASE, step="convert"))
    with pytest.raises(ValueError, match="found no layer to prepare"):
        quantize_(Model(), QATConfig(BASE), filter_fn=lambda *_: False)


def test_what_cannot_be_prepared_is_an_error_and_nothing_is_changed():
    model = Model()
    with pytest.raises(ValueError, match="Module of type 'Model' does not have QAT support"):
        quantize_(model, QATConfig(BASE), filter_fn=lambda *_: True)
    with pytest.raises(ValueError, match="Activation fake quantization is not supported for embedding"):
        quantize_(model, QATConfig(BASE), filter_fn=is_embedding)
    model.block[2] = nn.Linear(129, 64)
    with pytest.raises(ValueError, match=r"'block.2': in_features \(129\) % group_size \(32\) must be == 0"):
        quantize_(model, QATConfig(BASE))
    assert kinds(model) == [nn.Embedding, *[nn.Linear] * 3]
    with pytest.raises(ValueError, match="cannot be swapped in place; want a model that holds it"):
        quantize_(nn.Linear(64, 64), QATConfig(BASE))


def test_meta_device():
    model = Model().to("meta")
    quantize_(model, QATConfig(BASE))
    quantize_(model, QATConfig(step="convert"))
    assert kinds(model)[1:] == [nn.Linear] * 3


def test_tied_embeddings_stay_tied():
    model = Model(tied=True)
    quantize_(model, QATConfig(WEIGHT_ONLY))
    with pytest.raises(ValueError, match=r"'lm_head', whose weight is that of 'embed', which is not quantized with it"):
        quantize_(model, QATConfig(WEIGHT_ONLY, step="convert"))
    quantize_(model, QATConfig(WEIGHT_ONLY), filter_fn=is_embedding)
    prepared = model(tokens())
    quantize_(model, QATConfig(WEIGHT_ONLY, step="convert"))
    quantize_(model, QATConfig(WEIGHT_ONLY, step="convert"), filter_fn=is_embedding)
    assert kinds(model) == [QuantizedEmbedding, *[QuantizedLinear] * 3]
    assert model.lm_head.codes is model.embed.codes
    assert torch.equal(model(tokens()), prepared)
    with pytest.raises(ValueError, match="converted already"):
        quantize_(model, QATConfig(WEIGHT_ONLY, step="convert"), filter_fn=is_embedding)


def test_a_tied_weight_has_one_quantization():
    model = Model(tied=True)
    quantize_(model, QATConfig(IntxWeightOnlyConfig(torch.int8, PerAxis(0))), filter_fn=is_embedding)
    quantize_(model, QATConfig(BASE))
    with pytest.raises(ValueError, match="share one weight but not its quantization"):
        quantize_(model, QATConfig(BASE, step="convert"))


@pytest.mark.parametrize(
    ("prepare", "convert"),
    [
        (IntXQuantizationAwareTrainingConfig, FromIntXQuantizationAwareTrainingConfig),
        (intx_quantization_aware_training, from_intx_quantization_aware_training),
    ],
)
def test_deprecated_names(prepare, convert):
    model = Model()
    with pytest.warns(FutureWarning, match="is deprecated; want QATConfig"):
        config = prepare(TOKENS, INT4)
    quantize_(model, config)
    assert kinds(model)[1:] == [FakeQuantizedLinear] * 3
    with pytest.warns(FutureWarning, match="is deprecated"):
        config = convert()
    quantize_(model, config)
    assert kinds(model)[1:] == [nn.Linear] * 3
