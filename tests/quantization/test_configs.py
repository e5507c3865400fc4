"""Base configurations: fields, order and defaults that users and checkpoints know; what they refuse."""

import dataclasses

import pytest
import torch

import aotrain.quantization as quantization
from aotrain.nn import KernelPreference, ScaleCalculationMode
from aotrain.quantization import (
    AOBaseConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8MMConfig,
    Float8PackingFormat,
    Float8WeightOnlyConfig,
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
    IntxWeightOnlyConfig,
    MappingType,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)

E4M3 = torch.float8_e4m3fn
FIELDS = {
    Int4WeightOnlyConfig: {
        "group_size": 128,
        "set_inductor_config": True,
        "int4_packing_format": Int4PackingFormat.PLAIN,
        "int4_choose_qparams_algorithm": Int4ChooseQParamsAlgorithm.TINYGEMM,
        "int4_tile_packed_ntile": 8,
        "version": 2,
    },
    Int8DynamicActivationIntxWeightConfig: {
        "weight_dtype": torch.int8,
        "weight_granularity": PerGroup(32),
        "weight_mapping_type": MappingType.SYMMETRIC,
        "weight_scale_dtype": None,
        "act_mapping_type": MappingType.ASYMMETRIC,
        "intx_packing_format": IntxPackingFormat.UNPACKED_TO_INT8,
        "intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.AFFINE,
        "version": 2,
    },
    IntxWeightOnlyConfig: {
        "weight_dtype": torch.int8,
        "granularity": PerAxis(0),
        "mapping_type": MappingType.SYMMETRIC,
        "scale_dtype": None,
        "intx_packing_format": IntxPackingFormat.UNPACKED_TO_INT8,
        "intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.AFFINE,
        "version": 2,
    },
    Int8WeightOnlyConfig: {"group_size": None, "granularity": PerRow(), "set_inductor_config": True, "version": 2},
    Int8DynamicActivationInt8WeightConfig: {
        "act_mapping_type": MappingType.SYMMETRIC,
        "weight_only_decode": False,
        "granularity": PerRow(),
        "set_inductor_config": True,
        "version": 2,
        "reduce_range": False,
    },
    Int8DynamicActivationInt4WeightConfig: {
        "group_size": 32,
        "layout": None,
        "mapping_type": MappingType.SYMMETRIC,
        "act_mapping_type": MappingType.ASYMMETRIC,
        "set_inductor_config": True,
    },
    Float8WeightOnlyConfig: {
        "weight_dtype": E4M3,
        "set_inductor_config": True,
        "version": 2,
        "granularity": PerRow(),
    },
    Float8DynamicActivationFloat8WeightConfig: {
        "activation_dtype": E4M3,
        "weight_dtype": E4M3,
        "granularity": [PerTensor(), PerTensor()],
        "packing_format": Float8PackingFormat.PLAIN,
        "mm_config": Float8MMConfig(False, True, False),
        "activation_value_lb": None,
        "activation_value_ub": None,
        "kernel_preference": KernelPreference.AUTO,
        "set_inductor_config": True,
        "version": 2,
        "alg_id": 0,
    },
    Float8DynamicActivationInt4WeightConfig: {"int4_packing_format": "preshuffled"},
    MXDynamicActivationMXWeightConfig: {
        "block_size": 32,
        "activation_dtype": E4M3,
        "weight_dtype": E4M3,
        "kernel_preference": KernelPreference.AUTO,
        "scaling_mode": ScaleCalculationMode.RCEIL,
    },
    NVFP4DynamicActivationNVFP4WeightConfig: {
        "use_triton_kernel": True,
        "use_dynamic_per_tensor_scale": True,
        "step": None,
    },
    NVFP4WeightOnlyConfig: {"use_dynamic_per_tensor_scale": True},
}


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_fields_order_and_defaults(cls: type[AOBaseConfig]):
    config = cls()
    assert {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} == FIELDS[cls]
    assert [field.name for field in dataclasses.fields(config)] == list(FIELDS[cls])
    assert isinstance(config, AOBaseConfig)
    assert config == cls(**FIELDS[cls])


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_fields_are_those_of_the_peer(cls: type[AOBaseConfig]):
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    formats = pytest.importorskip(
        "torchao.prototype.mx_formats", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    peer = getattr(peers, cls.__name__, None) or getattr(formats, cls.__name__, None)
    if cls is Int8DynamicActivationInt4WeightConfig:
        assert peer is None  # removed there
        return
    assert [field.name for field in dataclasses.fields(peer)] == list(FIELDS[cls])


def test_enumerations_are_those_of_the_peer():
    peers = pytest.importorskip(
        "torchao.quantization.quantize_.workflows", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    common = pytest.importorskip(
        "torchao.quantization.quantize_.common", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    names = ("Int4PackingFormat", "Int4ChooseQParamsAlgorithm", "IntxPackingFormat", "IntxChooseQParamsAlgorithm")
    for name in (*names, "Float8PackingFormat"):
        ours, theirs = getattr(quantization, name), getattr(peers, name)
        assert {each.name: each.value for each in ours} == {each.name: each.value for each in theirs}
    assert {each.name: each.value for each in KernelPreference} == {
        each.name: each.value for each in common.KernelPreference
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int4WeightOnlyConfig(version=1), "version=1; want 2"),
        (lambda: Int4WeightOnlyConfig(group_size=0), "group_size=0"),
        (lambda: Int4WeightOnlyConfig(int4_tile_packed_ntile=4), "want 8 or 16"),
        (lambda: Int4WeightOnlyConfig(int4_choose_qparams_algorithm="hqq"), "got HQQ with PLAIN"),
        (lambda: IntxWeightOnlyConfig(weight_dtype=torch.uint4), "torch.int1 to torch.int8"),
        (lambda: IntxWeightOnlyConfig(granularity=PerToken()), "PerAxis"),
        (lambda: IntxWeightOnlyConfig(granularity=PerGroup(0)), "at least 1"),
        (
            lambda: Int8DynamicActivationIntxWeightConfig(act_mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
            "SYMMETRIC or ASYMMETRIC",
        ),
        (lambda: Int8DynamicActivationInt4WeightConfig(layout="marlin"), "leave it out"),
        (lambda: Int8WeightOnlyConfig(version=1), "version=1; want 2"),
        (lambda: Int8WeightOnlyConfig(group_size=32), r"want granularity=PerGroup\(32\)"),
        (lambda: Int8WeightOnlyConfig(granularity=PerToken()), r"want PerRow\(\)"),
        (lambda: Int8DynamicActivationInt8WeightConfig(version=1), "version=1; want 2"),
        (lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerRow(0)), "or a pair"),
        (lambda: Int8DynamicActivationInt8WeightConfig(weight_only_decode=True), "Int8WeightOnlyConfig"),
        (lambda: Float8WeightOnlyConfig(weight_dtype=torch.int8), "want a float8 dtype"),
        (lambda: Float8WeightOnlyConfig(granularity=PerToken()), r"want PerRow\(\)"),
        (lambda: Float8DynamicActivationFloat8WeightConfig(granularity=(PerRow(), PerTensor())), "PerBlock"),
        (
            lambda: Float8DynamicActivationFloat8WeightConfig(activation_value_lb=2.0, activation_value_ub=1.0),
            "0 <= lb < ub",
        ),
        (lambda: Float8DynamicActivationInt4WeightConfig("tile"), "'preshuffled' or 'plain'"),
        (lambda: MXDynamicActivationMXWeightConfig(weight_dtype=torch.float8_e5m2), "for both"),
        (lambda: MXDynamicActivationMXWeightConfig(block_size=16), "blocks of 16"),
        (lambda: NVFP4DynamicActivationNVFP4WeightConfig(step="train"), "'prepare' or 'convert'"),
    ],
)
def test_what_they_refuse(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_normalised():
    blocks = (PerBlock([1, 128]), PerBlock([128, 128]))
    config = Float8DynamicActivationFloat8WeightConfig(granularity=blocks)
    assert config.granularity == list(blocks)
    assert config.mm_config == Float8MMConfig(use_fast_accum=False)
    assert NVFP4DynamicActivationNVFP4WeightConfig(step="PREPARE").use_dynamic_per_tensor_scale is False
    assert Int8DynamicActivationInt8WeightConfig(granularity=None).granularities == (PerRow(), PerRow())
