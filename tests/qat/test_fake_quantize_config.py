"""Base configurations as fake-quantize configurations: the table of kinds, and the same numbers as `scheme_of`."""

import pytest
import torch

from aotrain.formats import MappingType
from aotrain.qat import (
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    MXFakeQuantizeConfig,
    NVFP4FakeQuantizeConfig,
)
from aotrain.qat.fake_quantize_config import infer_fake_quantize_configs
from aotrain.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    scheme_of,
)
from tests.qat.models import randn

TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)
BLOCKS = (PerBlock((1, 128)), PerBlock((128, 128)))
MX = MXFakeQuantizeConfig(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("base", "activation", "weight"),
    [
        (Int4WeightOnlyConfig(32), None, Int4WeightFakeQuantizeConfig(32, torch.bfloat16)),
        (
            IntxWeightOnlyConfig(torch.int2, PerGroup(32)),
            None,
            IntxFakeQuantizeConfig(torch.int2, group_size=32, scale_precision=None),
        ),
        (
            Int8DynamicActivationIntxWeightConfig(torch.int4, PerAxis(0)),
            TOKENS,
            IntxFakeQuantizeConfig(torch.int4, "per_channel", scale_precision=None),
        ),
        (
            Int8DynamicActivationInt4WeightConfig(),
            TOKENS,
            IntxFakeQuantizeConfig(torch.int4, group_size=32, scale_precision=None),
        ),
        (
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_ub=2.0),
            Float8FakeQuantizeConfig(hp_value_ub=2.0),
            Float8FakeQuantizeConfig(),
        ),
        (
            Float8DynamicActivationInt4WeightConfig(),
            Float8FakeQuantizeConfig(),
            Int4WeightFakeQuantizeConfig(),
        ),
        (MXDynamicActivationMXWeightConfig(), MX, MX),
        (
            NVFP4DynamicActivationNVFP4WeightConfig(),
            NVFP4FakeQuantizeConfig(),
            NVFP4FakeQuantizeConfig(use_swizzled_scales=True, use_triton_kernel=True),
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_kinds(base, activation, weight):
    got = infer_fake_quantize_configs(base)
    if isinstance(base, MXDynamicActivationMXWeightConfig):
        assert [type(config) for config in got] == [MXFakeQuantizeConfig] * 2
    else:
        assert got == (activation, weight)


@pytest.mark.parametrize(
    "base",
    [
        Int8WeightOnlyConfig(),
        Int8DynamicActivationInt8WeightConfig(),
        Float8WeightOnlyConfig(),
        NVFP4WeightOnlyConfig(),
        Float8DynamicActivationFloat8WeightConfig(),
        Float8DynamicActivationFloat8WeightConfig(granularity=BLOCKS),
        IntxWeightOnlyConfig(torch.int4, mapping_type=MappingType.ASYMMETRIC, scale_dtype=torch.bfloat16),
        IntxWeightOnlyConfig(torch.int4, mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
        Int8DynamicActivationIntxWeightConfig(act_mapping_type=MappingType.SYMMETRIC),
        MXDynamicActivationMXWeightConfig(activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2),
        Int4WeightOnlyConfig(32, int4_packing_format="tile_packed_to_4d"),
    ],
    ids=str,
)
def test_every_scheme_can_be_trained(base):
    scheme = scheme_of(base)
    activation, weight = infer_fake_quantize_configs(base)
    x = randn(128, 128)
    assert torch.equal(weight.to_scheme().values(x), scheme.weight.values(x))
    assert (activation is None) == (scheme.activation is None)
    if activation is not None:
        assert torch.equal(activation.to_scheme().values(x), scheme.activation.values(x))


def test_what_has_no_scheme_is_an_error():
    with pytest.raises(ValueError, match=r"Unexpected base config: .*PLAIN_INT32"):
        infer_fake_quantize_configs(Int4WeightOnlyConfig(int4_packing_format="plain_int32"))
    with pytest.raises(ValueError, match="Unexpected base config: 3"):
        infer_fake_quantize_configs(3)
    beyond_the_table = infer_fake_quantize_configs(Int8WeightOnlyConfig())
    assert beyond_the_table[0] is None
    assert beyond_the_table[1].to_scheme() == scheme_of(Int8WeightOnlyConfig()).weight
