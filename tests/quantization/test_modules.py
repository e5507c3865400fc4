"""Quantized layers: the weight is the scheme's, the state is plain tensors, and moving a layer changes no number."""

import copy

import pytest
import torch
from torch import nn

from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.quantization import (
    AOBaseConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4WeightOnlyConfig,
    PerBlock,
    PerGroup,
    PerRow,
    QuantizedEmbedding,
    QuantizedLinear,
    get_scheme,
    scheme_of,
)
from tests.quantization.base_configs import BASE_CONFIGS, DTYPES, kind, sample

WEIGHT_ONLY = [config for config in BASE_CONFIGS if scheme_of(config).activation is None]
INT8_BYTES, INT4_BYTES, INT2_BYTES = 256, 128, 64


def linear(config: AOBaseConfig, dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(256, 128, dtype=dtype, **kwargs)
    return plain, QuantizedLinear.from_linear(plain, scheme_of(config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", BASE_CONFIGS, ids=kind)
def test_the_layer_is_what_was_trained(config: AOBaseConfig, dtype: torch.dtype):
    plain, layer = linear(config, dtype)
    scheme = scheme_of(config)
    assert torch.equal(layer.weight, scheme.weight.values(plain.weight))
    for name, part in scheme.weight.encode(plain.weight)._asdict().items():
        other = getattr(layer.encoded(), name)
        assert (part is None) == (other is None)
        if part is not None:
            assert other.dtype == part.dtype
            assert torch.equal(other.to(torch.float32), part.to(torch.float32))
    x = sample(2, 3, 256, dtype=dtype).requires_grad_()
    want = fake_quantized_linear(x, plain.weight, plain.bias, scheme.activation, scheme.weight)
    got = layer(x)
    assert torch.equal(got, want)
    vector = x[0, 0].detach()
    one = fake_quantized_linear(vector, plain.weight, plain.bias, scheme.activation, scheme.weight)
    assert torch.equal(layer(vector), one)
    grad = sample(2, 3, 128, dtype=dtype, seed=1)
    assert torch.equal(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(want, x, grad)[0])
    assert layer.bias is plain.bias


@pytest.mark.parametrize("config", BASE_CONFIGS, ids=kind)
def test_state_moves_copies_and_compiles(config: AOBaseConfig):
    plain, layer = linear(config)
    x = sample(3, 256)
    want, weight = layer(x), layer.weight
    state = layer.state_dict()
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in state.values())
    assert not any(tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu) for tensor in state.values())
    other = QuantizedLinear(torch.zeros_like(plain.weight), torch.zeros(128), scheme_of(config))
    other.load_state_dict(state)
    assert torch.equal(other(x), want)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    with torch.device("meta"):
        meta = QuantizedLinear(torch.empty(128, 256), torch.empty(128), scheme_of(config))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in meta.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in state.items()
    }
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), want)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == layer(x.bfloat16()).dtype == torch.bfloat16
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(layer.float().weight, weight)
    assert {tensor.device.type for tensor in layer.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(
    "config",
    [WEIGHT_ONLY[0], WEIGHT_ONLY[2], Int8DynamicActivationInt8WeightConfig(), NVFP4WeightOnlyConfig()],
    ids=kind,
)
def test_export_and_compile(config: AOBaseConfig):
    _, layer = linear(config)
    x = sample(3, 256)
    with torch.no_grad():
        want = layer(x)
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x), want)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), want)


@pytest.mark.parametrize(
    ("bits", "row"), [(8, INT8_BYTES), (5, INT8_BYTES), (4, INT4_BYTES), (3, INT4_BYTES), (2, INT2_BYTES), (1, 32)]
)
def test_codes_are_packed(bits: int, row: int):
    _, layer = linear(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32)))
    assert layer.codes.shape == (128, row)
    assert layer.codes.element_size() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast_the_product_is_in_its_dtype(dtype: torch.dtype):
    plain, layer = linear(Int8DynamicActivationInt8WeightConfig(), dtype)
    scheme, x = layer.scheme, sample(3, 256, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = fake_quantized_linear(x, plain.weight, plain.bias, scheme.activation, scheme.weight)
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_given_scales_are_used_and_copied():
    plain = nn.Linear(64, 8)
    scheme = get_scheme("int4-g32")
    scale = torch.full((8, 2), 0.01, requires_grad=True)
    layer = QuantizedLinear.from_linear(plain, scheme, scale=scale)
    assert torch.equal(layer.scale, scale.detach())
    assert torch.equal(
        layer.weight, scheme.weight.decode(scheme.weight.encode(plain.weight, scale=scale), torch.float32)
    )
    with torch.no_grad():
        scale.zero_()
    assert (layer.scale == 0.01).all()
    assert not layer.scale.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", WEIGHT_ONLY, ids=kind)
def test_embeddings_are_rows_of_the_weight(config: AOBaseConfig, dtype: torch.dtype):
    plain = nn.Embedding(50, 256, padding_idx=3, dtype=dtype)
    layer = QuantizedEmbedding.from_embedding(plain, scheme_of(config))
    indices = torch.tensor([[0, 3, 49], [7, 7, 1]])
    assert torch.equal(layer.weight, scheme_of(config).weight.values(plain.weight))
    assert torch.equal(layer(indices), layer.weight[indices])
    assert layer(indices).dtype == dtype
    assert layer(indices[:0]).shape == (0, 3, 256)


# SQNR in dB against the dequantized product: results have 8 bits in bfloat16, 11 in float16, and the scales of `w8` and
# `w4` are rounded to the dtype of the input. Measured: 48.2, 66.9 and 130 dB and more.
THRESHOLD_DB = {torch.bfloat16: 47.0, torch.float16: 65.0, torch.float32: 125.0}


def sqnr(want: torch.Tensor, got: torch.Tensor) -> float:
    return 20 * torch.log10(want.norm() / (got - want).norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Float8DynamicActivationFloat8WeightConfig(),
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        Float8DynamicActivationFloat8WeightConfig(granularity=[PerBlock([1, 128]), PerBlock([128, 128])]),
        MXDynamicActivationMXWeightConfig(),
        Int8DynamicActivationInt8WeightConfig(),
        Int8WeightOnlyConfig(),
        Int4WeightOnlyConfig(32),
        IntxWeightOnlyConfig(torch.int4, PerGroup(64)),
    ],
    ids=kind,
)
def test_fast_products_agree(config: AOBaseConfig, dtype: torch.dtype, monkeypatch):
    from aotrain.quantization import products

    _, layer = linear(config, dtype)
    x = sample(2, 8, 256, dtype=dtype)
    with torch.no_grad():
        want = layer(x).float()
        assert products.fast_products(nn.Sequential(layer)) == 1
        assert products.find_product(layer, x, dtype) is not None
        got = layer(x)
    assert got.dtype == dtype
    assert sqnr(want, got.float()) >= THRESHOLD_DB[dtype]
    layer.scale.mul_(2) if layer.scale.is_floating_point() else layer.scale.add_(
        1
    )  # what was made of the old scales is not used again
    with torch.no_grad():
        got = layer(x).float()
        products.fast_products(layer, enabled=False)
        want = layer(x).float()
    assert sqnr(want, got) >= THRESHOLD_DB[dtype]
    assert products.find_product(layer, x.clone().requires_grad_(), dtype) is None
    assert products.find_product(layer, x[:0], dtype) is None
    assert layer(x[:0]).shape == (0, 8, 128)


def test_schemes_without_a_product_multiply_by_the_weight():
    from aotrain.quantization.products import fast_products

    for config in BASE_CONFIGS:
        _, layer = linear(config)
        x = sample(64, 256)
        with torch.no_grad():
            want = layer(x)
            fast_products(layer)
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_quantized_is_an_error():
    scheme = get_scheme("int4-g32")
    with pytest.raises(ValueError, match="no multiple of the group size 32"):
        QuantizedLinear.from_linear(nn.Linear(40, 8), scheme)
    with pytest.raises(ValueError, match="want a plain matrix"):
        QuantizedLinear(torch.zeros(2, 8, 32), None, scheme)
    with pytest.raises(ValueError, match="got a scheme with activations"):
        QuantizedEmbedding.from_embedding(nn.Embedding(8, 32), get_scheme("int8"))
    with pytest.raises(ValueError, match=r"max_norm=1\.0; want None"):
        QuantizedEmbedding.from_embedding(nn.Embedding(8, 32, max_norm=1.0), scheme)


def test_they_print_what_they_are():
    _, layer = linear(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    assert str(layer) == (
        "QuantizedLinear(in_features=256, out_features=128, bias=True, scheme=int4-g32, dtype=torch.float32)"
    )
    assert "50, 32, scheme=int4-g32" in str(QuantizedEmbedding.from_embedding(nn.Embedding(50, 32), layer.scheme))
