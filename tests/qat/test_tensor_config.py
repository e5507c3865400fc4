"""Fake-quantize configurations: what they accept, what they refuse with which words, and the scheme they give."""

import pytest
import torch

from aotrain.formats import MappingType, ZeroPointDomain
from aotrain.nn import ScaleCalculationMode
from aotrain.qat import (
    FakeQuantizeConfig,
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    MXFakeQuantizeConfig,
    NVFP4FakeQuantizeConfig,
    SchemeFakeQuantizeConfig,
)
from aotrain.quantization import SCHEMES, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from tests.qat.models import randn


def test_ways_to_write_one_granularity_and_mapping():
    assert IntxFakeQuantizeConfig(torch.int8, "per_token").granularity == PerToken()
    assert IntxFakeQuantizeConfig(torch.int4, "per_channel") == IntxFakeQuantizeConfig(torch.int4, PerAxis(0))
    groups = IntxFakeQuantizeConfig(torch.int4, PerGroup(32))
    assert groups == IntxFakeQuantizeConfig(torch.int4, group_size=32)
    assert groups == IntxFakeQuantizeConfig(torch.int4, "per_group", group_size=32, is_symmetric=True)
    assert IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=False).mapping_type is MappingType.ASYMMETRIC


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int16, "group_size": 32}, "Unsupported dtype 'torch.int16', choose from"),
        ({"granularity": PerToken(), "group_size": 32}, "`group_size` conflicts with granularity"),
        ({"granularity": "per_token", "group_size": 32}, "`group_size` conflicts with granularity 'per_token'"),
        ({"granularity": PerRow()}, r"Granularity 'PerRow\(dim=-1\)' is not supported"),
        ({"granularity": PerAxis(1)}, "Only axis=0 is supported for PerAxis granularity"),
        ({"granularity": "per_group"}, "Granularity was 'per_group' but no `group_size` was set"),
        (
            {"granularity": "per_row"},
            r"Unexpected granularity: 'per_row', must be one of \['per_token', 'per_channel', 'per_group'\]",
        ),
        ({"granularity": 3}, "Granularity '3' has unexpected type <class 'int'>"),
        ({}, "At least one of `granularity` or `group_size` must be set"),
        (
            {"group_size": 32, "mapping_type": MappingType.SYMMETRIC_NO_CLIPPING_ERR},
            "MappingType 'MappingType.SYMMETRIC_NO_CLIPPING_ERR' is not supported",
        ),
        (
            {"group_size": 32, "mapping_type": MappingType.SYMMETRIC, "is_symmetric": True},
            "Cannot set both `mapping_type` and `is_symmetric`",
        ),
        ({"group_size": 32, "zero_point_domain": None}, "Please use ZeroPointDomain.NONE instead of None"),
        ({"group_size": 32, "range_learning": True}, "`is_dynamic` is not compatible with `range_learning`"),
        (
            {"granularity": "per_token", "is_dynamic": False, "range_learning": True},
            "range_learning per token; tokens of one batch are not those of the next",
        ),
    ],
)
def test_what_the_integer_configuration_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntxFakeQuantizeConfig(**{"dtype": torch.int4, **arguments})


def test_group_size_and_symmetry_may_be_assigned():
    config = IntxFakeQuantizeConfig(torch.int4, "per_channel")
    with pytest.raises(ValueError, match="`group_size` is undefined for PerAxis"):
        config.group_size  # noqa: B018
    config.group_size = 64
    assert (config.group_size, config.granularity) == (64, PerGroup(64))
    config.is_symmetric = False
    assert config.mapping_type is MappingType.ASYMMETRIC
    assert config.to_scheme().format.group_size == 64


def test_the_older_name_passes_for_the_newer():
    assert isinstance(IntxFakeQuantizeConfig(torch.int4, group_size=32), FakeQuantizeConfig)
    assert isinstance(FakeQuantizeConfig(torch.int4, group_size=32), IntxFakeQuantizeConfig)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32), PerToken()])
@pytest.mark.parametrize("kind", ["int", "uint"])
def test_every_combination_follows_the_tensor(bits: int, symmetric: bool, granularity, kind: str):
    """Others take zero points of asymmetric groups for another kind, and clip half of a symmetric unsigned type."""
    x = randn(16, 64) + 0.5
    config = IntxFakeQuantizeConfig(getattr(torch, f"{kind}{bits}"), granularity, is_symmetric=symmetric)
    values = config.to_scheme().values(x)
    step = (x.amax(-1) - x.amin(-1)).max() if not symmetric else 2 * x.abs().amax()
    assert (values - x).abs().max() <= 1.01 * step / (2**bits - 1)


def test_value_zero_points_belong_to_asymmetric_unsigned_types():
    value = {"group_size": 32, "zero_point_domain": ZeroPointDomain.FLOAT}
    config = IntxFakeQuantizeConfig(torch.uint4, is_symmetric=False, **value)
    x = randn(16, 64)
    assert (config.to_scheme().values(x) - x).abs().max() < (x.max() - x.min()) / 15
    for dtype, symmetric in ((torch.int4, False), (torch.uint4, True)):
        with pytest.raises(ValueError, match=r"want an ASYMMETRIC unsigned type.*or ZeroPointDomain.INT"):
            IntxFakeQuantizeConfig(dtype, is_symmetric=symmetric, **value)


def test_no_zero_points_belong_to_symmetric_signed_types():
    none = {"group_size": 32, "zero_point_domain": ZeroPointDomain.NONE}
    assert IntxFakeQuantizeConfig(torch.int4, **none)
    for dtype, symmetric in ((torch.int4, False), (torch.uint4, True)):
        with pytest.raises(ValueError, match="clips one side of zero; want a SYMMETRIC signed type"):
            IntxFakeQuantizeConfig(dtype, is_symmetric=symmetric, **none)


def test_what_the_others_refuse():
    with pytest.raises(ValueError, match=r"Only .* or torch.bfloat16 activation are supported"):
        Int4WeightFakeQuantizeConfig(activation_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch.int8 is not a float8 dtype"):
        Float8FakeQuantizeConfig(torch.int8)
    with pytest.raises(ValueError, match="Please specify the granularity object instead of the class"):
        Float8FakeQuantizeConfig(granularity=PerRow)
    with pytest.raises(ValueError, match="Expected PerRow or PerTensor granularity, got PerBlock"):
        Float8FakeQuantizeConfig(granularity=PerBlock((1, 128)))
    with pytest.raises(ValueError, match="want one of"):
        MXFakeQuantizeConfig(torch.int8)
    with pytest.raises(ValueError, match="blocks of 16; want"):
        MXFakeQuantizeConfig(block_size=16)


@pytest.mark.parametrize(
    "config",
    [
        Int4WeightFakeQuantizeConfig(),
        Int4WeightFakeQuantizeConfig(32, torch.bfloat16),
        Float8FakeQuantizeConfig(),
        Float8FakeQuantizeConfig(torch.float8_e5m2, PerTensor()),
        Float8FakeQuantizeConfig(hp_value_lb=0.5, hp_value_ub=2.0),
        MXFakeQuantizeConfig(),
        MXFakeQuantizeConfig(torch.float8_e4m3fn, scaling_mode=ScaleCalculationMode.FLOOR),
        NVFP4FakeQuantizeConfig(),
        NVFP4FakeQuantizeConfig(use_per_tensor_scale=False),
        SchemeFakeQuantizeConfig(SCHEMES["q4_0"].weight),
    ],
    ids=str,
)
def test_each_gives_a_scheme(config: FakeQuantizeConfigBase):
    x = randn(32, 128)
    values = config.to_scheme().values(x)
    assert values.shape == x.shape
    assert 0 < (values - x).norm() < 0.3 * x.norm()


def test_bounds_of_float8_clip_the_scale():
    x = randn(4, 64)
    x[0, 0] = 100.0
    upper = Float8FakeQuantizeConfig(hp_value_ub=2.0).to_scheme().values(x)
    assert upper.abs().max() == 2.0
    lower = Float8FakeQuantizeConfig(hp_value_lb=1e4).to_scheme().encode(x)
    assert torch.allclose(lower.scale, torch.full_like(lower.scale, 1e4 / 448))
