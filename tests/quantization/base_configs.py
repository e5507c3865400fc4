"""Base configurations of every kind, and tensors to quantize, for the tests of this folder."""

import torch

from aotrain.formats import MappingType
from aotrain.nn import ScaleCalculationMode
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
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ASYMMETRIC = MappingType.ASYMMETRIC
FP4 = torch.float4_e2m1fn_x2

BASE_CONFIGS = (
    Int4WeightOnlyConfig(32),
    Int4WeightOnlyConfig(64, int4_packing_format="tile_packed_to_4d"),
    *(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32)) for bits in (2, 3, 4, 5)),
    IntxWeightOnlyConfig(),
    IntxWeightOnlyConfig(torch.int4, PerGroup(64), ASYMMETRIC, scale_dtype=torch.float32),
    Int8DynamicActivationIntxWeightConfig(torch.int4),
    Int8DynamicActivationIntxWeightConfig(act_mapping_type=MappingType.SYMMETRIC),
    Int8DynamicActivationInt4WeightConfig(64),
    Int8WeightOnlyConfig(),
    Int8WeightOnlyConfig(granularity=PerTensor()),
    Int8WeightOnlyConfig(granularity=PerGroup(64)),
    Int8DynamicActivationInt8WeightConfig(),
    Int8DynamicActivationInt8WeightConfig(ASYMMETRIC),
    Int8DynamicActivationInt8WeightConfig(granularity=PerTensor(), reduce_range=True),
    Float8WeightOnlyConfig(),
    Float8WeightOnlyConfig(torch.float8_e5m2, granularity=PerGroup(64)),
    Float8DynamicActivationFloat8WeightConfig(),
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=1e-3),
    Float8DynamicActivationFloat8WeightConfig(granularity=[PerBlock([1, 128]), PerBlock([128, 128])]),
    Float8DynamicActivationInt4WeightConfig(),
    MXDynamicActivationMXWeightConfig(),
    MXDynamicActivationMXWeightConfig(activation_dtype=FP4, weight_dtype=FP4, scaling_mode=ScaleCalculationMode.FLOOR),
    NVFP4DynamicActivationNVFP4WeightConfig(),
    NVFP4DynamicActivationNVFP4WeightConfig(use_dynamic_per_tensor_scale=False),
    NVFP4WeightOnlyConfig(),
)


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values of a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kind(config: object) -> str:
    """Identifier of a test."""
    return config if isinstance(config, str) else type(config).__name__.removesuffix("Config")
