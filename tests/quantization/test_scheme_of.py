"""scheme_of: every base configuration has the numbers of its documentation, and those of the peer, bit for bit."""

import pytest
import torch

from aotrain.formats import MappingType
from aotrain.quantization import (
    AOBaseConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8WeightOnlyConfig,
    Int4PackingFormat,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxPackingFormat,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    Scheme,
    scheme_of,
)
from tests.quantization.base_configs import BASE_CONFIGS, DTYPES, kind, sample

ASYMMETRIC = MappingType.ASYMMETRIC


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", BASE_CONFIGS, ids=kind)
def test_values_are_decoded_codes(config: AOBaseConfig, dtype: torch.dtype):
    scheme = scheme_of(config)
    assert scheme == scheme_of(config)
    assert hash(scheme) == hash(scheme_of(config))
    assert scheme.problem(256, 256) is None
    for x, each in (
        (sample(256, 256, dtype=dtype), scheme.weight),
        (sample(2, 3, 256, dtype=dtype), scheme.activation),
    ):
        if each is None:
            continue
        encoded = each.encode(x)
        assert encoded.data.shape == x.shape
        codes = encoded.data.view(torch.uint8) if encoded.data.is_floating_point() else encoded.data
        assert each.code_range[0] <= codes.min()
        assert codes.max() <= each.code_range[1]
        values = each.values(x)
        assert values.dtype == dtype
        assert torch.equal(values, each.decode(encoded, dtype))
        assert (values - x).float().norm() < 0.5 * x.float().norm()
        zeros = torch.zeros_like(x)
        assert torch.equal(each.values(zeros), zeros)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (IntxWeightOnlyConfig(torch.int2, PerGroup(32)), "int2-g32"),
        (IntxWeightOnlyConfig(torch.int4, PerGroup(128)), "int4-g128"),
        (Int8DynamicActivationIntxWeightConfig(torch.int4), "8da4w"),
        (Int8DynamicActivationInt4WeightConfig(), "8da4w"),
        (Int8DynamicActivationIntxWeightConfig(torch.int4, act_mapping_type=MappingType.SYMMETRIC), "int4-g32-a8"),
        (Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), "fp8"),
        (Float8WeightOnlyConfig(), "fp8-weight-only"),
        (
            Float8DynamicActivationFloat8WeightConfig(granularity=[PerBlock([1, 128]), PerBlock([128, 128])]),
            "fp8-block",
        ),
        (NVFP4WeightOnlyConfig(), "nvfp4"),
    ],
    ids=kind,
)
def test_configurations_are_schemes_that_have_a_name(config: AOBaseConfig, name: str):
    assert scheme_of(config).name == name


def test_a_tensor_of_activations_has_one_scale_however_its_rows_are_arranged():
    x = sample(2, 3, 256)
    x[0] *= 100
    for config in (
        Float8DynamicActivationFloat8WeightConfig(),
        NVFP4DynamicActivationNVFP4WeightConfig(),
        Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
        Int8DynamicActivationInt8WeightConfig(granularity=PerTensor(), act_mapping_type=ASYMMETRIC),
    ):
        scheme = scheme_of(config).activation
        assert torch.equal(scheme.values(x).flatten(0, 1), scheme.values(x.flatten(0, 1)))
        assert scheme.pass_gradient(torch.ones_like(x), x).shape == x.shape


def test_bounds_of_activations():
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=1.0, activation_value_ub=4.0
    )
    scheme = scheme_of(config).activation
    x = torch.tensor([[0.1, 0.01], [2.0, 0.1], [8.0, 4.0]])
    torch.testing.assert_close(scheme.encode(x).scale.flatten() * 448, torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(scheme.values(x)[2], torch.tensor([4.0, 4.0]))
    assert torch.equal(scheme.pass_gradient(torch.ones_like(x), x), (x <= 4.0).float())


def test_int4_weights_with_zero_points_follow_their_formula():
    w = sample(8, 64)
    scheme = scheme_of(Int4WeightOnlyConfig(32)).weight
    encoded = scheme.encode(w)
    groups = w.double().unflatten(-1, (-1, 32))
    low, high = groups.amin(-1), groups.amax(-1)
    torch.testing.assert_close(encoded.scale.double(), (high - low) / 15, rtol=1e-6, atol=0)
    torch.testing.assert_close(encoded.zero_point.double(), low + 8 * (high - low) / 15, rtol=1e-5, atol=1e-7)
    assert encoded.data.min() == 0
    assert encoded.data.max() == 15


def test_int4_weights_for_float8_follow_their_formula():
    w = sample(8, 256)
    scheme = scheme_of(Float8DynamicActivationInt4WeightConfig()).weight
    encoded = scheme.encode(w)
    groups = w.unflatten(-1, (-1, 128))
    assert torch.equal(encoded.scale, groups.abs().amax(-1) / 8)
    want = torch.round(groups / encoded.scale.unsqueeze(-1)).clamp(-8, 7)
    assert (encoded.data.unflatten(-1, (-1, 128)) - want).abs().max() <= 1  # a reciprocal rounds ties otherwise
    inside = scheme.pass_gradient(torch.ones_like(w), w)
    assert torch.equal(
        inside.bool().logical_not(),
        torch.round(w.unflatten(-1, (-1, 128)) / encoded.scale.unsqueeze(-1)).flatten(1) > 7,
    )
    w[0, 3] = torch.inf
    assert scheme.values(w)[0, :128].isnan().all()
    assert scheme.values(w)[0, 128:].isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Int4WeightOnlyConfig(int4_packing_format="plain_int32"), "PLAIN_INT32; want PLAIN"),
        (
            Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"),
            "HQQ; want TINYGEMM",
        ),
        (IntxWeightOnlyConfig(intx_packing_format=IntxPackingFormat.OPAQUE_TORCHAO_AUTO), "UNPACKED_TO_INT8"),
        (NVFP4DynamicActivationNVFP4WeightConfig(step="prepare"), "step='prepare'; want None"),
        (IntxWeightOnlyConfig(torch.int1, mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR), "int1 with"),
        (AOBaseConfig(), "got a AOBaseConfig; want a base configuration"),
    ],
    ids=kind,
)
def test_what_has_no_scheme_is_an_error(config: AOBaseConfig, message: str):
    with pytest.raises(ValueError, match=message):
        scheme_of(config)


# The peer.


def _same(scheme: Scheme, w: torch.Tensor, peer: torch.Tensor) -> None:
    encoded = scheme.weight.encode(w)
    assert torch.equal(encoded.data, peer.qdata)
    assert encoded.scale.dtype == peer.scale.dtype
    assert torch.equal(encoded.scale, peer.scale)
    assert torch.equal(scheme.weight.decode(encoded, w.dtype), peer.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mapping", MappingType)
def test_integer_weights_equal_the_peers(mapping: MappingType, bits: int, dtype: torch.dtype):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    layer = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
    w = layer.weight.detach().clone()
    int_dtype = getattr(torch, f"int{bits}")
    if bits == 1 and mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
        return  # NaN there, an error here
    for ours, theirs in ((PerAxis(0), peers.PerAxis(0)), (PerGroup(32), peers.PerGroup(32))):
        layer = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
        layer.weight.data.copy_(w)
        peer_config = peers.IntxWeightOnlyConfig(int_dtype, theirs, peers.MappingType[mapping.name])
        peers.quantize_(layer, peer_config)
        scheme = scheme_of(IntxWeightOnlyConfig(int_dtype, ours, mapping))
        _same(scheme, w, layer.weight)
        if mapping is ASYMMETRIC:
            assert torch.equal(scheme.weight.encode(w).zero_point, layer.weight.zero_point.int())


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_another_dtype_equal_the_peers(dtype: torch.dtype, scale_dtype: torch.dtype):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    w = sample(16, 128, dtype=dtype)
    layer = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
    layer.weight.data.copy_(w)
    peers.quantize_(layer, peers.IntxWeightOnlyConfig(torch.int4, peers.PerGroup(32), scale_dtype=scale_dtype))
    scheme = scheme_of(IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=scale_dtype))
    if torch.promote_types(dtype, scale_dtype) == scale_dtype:
        _same(scheme, w, layer.weight)
        return
    # A scale narrower than the weight is inverted in the wider dtype here, in its own there: codes near ties differ,
    # and those here are the nearer ones.
    encoded = scheme.weight.encode(w)
    assert torch.equal(encoded.scale, layer.weight.scale)
    assert (encoded.data - layer.weight.qdata).abs().max() <= 1
    ours, theirs = (
        (codes.double().unflatten(1, (-1, 32)) * encoded.scale.double().unsqueeze(-1)).flatten(1) - w.double()
        for codes in (encoded.data, layer.weight.qdata)
    )
    assert ours.norm() <= theirs.norm() * (1 + 2**-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_activations_equal_the_peers(dtype: torch.dtype):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    layer = torch.nn.Linear(128, 128, bias=False, dtype=dtype)
    torch.nn.init.eye_(layer.weight)
    x = sample(5, 128, dtype=dtype)
    peers.quantize_(layer, peers.Int8DynamicActivationIntxWeightConfig(torch.int8, peers.PerAxis(0)))
    layer.weight.dequantize()
    scheme = scheme_of(Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)))
    eye = torch.eye(128, dtype=dtype)
    want = layer(x)
    got = torch.nn.functional.linear(scheme.activation.values(x), scheme.weight.values(eye))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_int8_weights_equal_the_peers(granularity: str, dtype: torch.dtype):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    layer = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
    w = layer.weight.detach().clone()
    ours = {"PerRow": PerRow(), "PerTensor": PerTensor()}[granularity]
    for config, peer in (
        (Int8WeightOnlyConfig(granularity=ours), peers.Int8WeightOnlyConfig(granularity=getattr(peers, granularity)())),
        (
            Int8DynamicActivationInt8WeightConfig(granularity=ours, reduce_range=True),
            peers.Int8DynamicActivationInt8WeightConfig(granularity=getattr(peers, granularity)(), reduce_range=True),
        ),
    ):
        layer = torch.nn.Linear(128, 16, bias=False, dtype=dtype)
        layer.weight.data.copy_(w)
        peers.quantize_(layer, peer)
        _same(scheme_of(config), w, layer.weight)


def test_int4_weights_equal_the_peers_fake_quantizer():
    qat = pytest.importorskip(
        "torchao.quantization.qat", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    configs = pytest.importorskip(
        "torchao.quantization.qat.fake_quantize_config", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    w = sample(16, 256)
    fake = qat.FakeQuantizerBase.from_config(configs.Int4WeightFakeQuantizeConfig(32, torch.bfloat16))
    torch.testing.assert_close(scheme_of(Int4WeightOnlyConfig(32)).weight.values(w), fake(w), rtol=0, atol=1e-6)


def test_int4_weights_of_tinygemm_equal_the_peers():
    primitives = pytest.importorskip(
        "torchao.quantization.quant_primitives", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    w = sample(16, 256, dtype=torch.bfloat16)
    scale, zero_point = primitives._choose_qparams_affine_tinygemm(
        w, primitives.MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15, scale_dtype=w.dtype, zero_point_dtype=w.dtype
    )
    codes = primitives._quantize_affine_tinygemm(w, (1, 32), scale, zero_point, torch.int32, 0, 15)
    config = Int4WeightOnlyConfig(32, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    encoded = scheme_of(config).weight.encode(w)
    assert torch.equal(encoded.data.int(), codes)
    assert torch.equal(encoded.scale, scale)
    assert torch.equal(encoded.zero_point, zero_point)


@pytest.mark.parametrize(
    "config",
    [
        MXDynamicActivationMXWeightConfig(weight_dtype=torch.float4_e2m1fn_x2, activation_dtype=torch.float4_e2m1fn_x2),
        MXDynamicActivationMXWeightConfig(),
    ],
    ids=["mxfp4", "mxfp8"],
)
def test_mx_weights_equal_the_peers(config: MXDynamicActivationMXWeightConfig):
    mx_tensor = pytest.importorskip(
        "torchao.prototype.mx_formats.mx_tensor", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    modes = pytest.importorskip(
        "torchao.prototype.mx_formats.config", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    w = sample(32, 128, dtype=torch.bfloat16)
    peer = mx_tensor.MXTensor.to_mx(w, config.weight_dtype, 32, modes.ScaleCalculationMode.RCEIL)
    assert torch.equal(scheme_of(config).weight.values(w), peer.dequantize(torch.bfloat16))
