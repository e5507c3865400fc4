"""Fake-quantize configurations, and those of a base configuration: what is trained, from what the model becomes.

| base configuration | activation | weight |
|---|---|---|
| `Int4WeightOnlyConfig` | none | `Int4WeightFakeQuantizeConfig(group_size, torch.bfloat16)` |
| `IntxWeightOnlyConfig` | none | `IntxFakeQuantizeConfig` |
| `Int8DynamicActivationIntxWeightConfig` | `IntxFakeQuantizeConfig(torch.int8, "per_token", asymmetric)` | the same |
| `Float8DynamicActivationFloat8WeightConfig` | `Float8FakeQuantizeConfig` | `Float8FakeQuantizeConfig` |
| `Float8DynamicActivationInt4WeightConfig` | `Float8FakeQuantizeConfig()` | `Int4WeightFakeQuantizeConfig()` |
| `MXDynamicActivationMXWeightConfig` | `MXFakeQuantizeConfig` | `MXFakeQuantizeConfig` |
| `NVFP4DynamicActivationNVFP4WeightConfig` | `NVFP4FakeQuantizeConfig` | `NVFP4FakeQuantizeConfig` |
| any other that has a scheme, or fields that these cannot express | `SchemeFakeQuantizeConfig` | likewise |

Whatever the row, its schemes are those of `quantization.scheme_of`, so what is trained is what conversion makes.
"""

from typing import Any

import torch

from aotrain.formats import MappingType
from aotrain.qat.mx_config import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig
from aotrain.qat.tensor_config import (
    INT4,
    FakeQuantizeConfig,
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    SchemeFakeQuantizeConfig,
)
from aotrain.quantization.configs import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
)
from aotrain.quantization.float_configs import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
)
from aotrain.quantization.granularity import Granularity, PerBlock, PerGroup
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import FlatScheme, Scheme, TensorScheme

__all__ = [
    "FakeQuantizeConfig",
    "FakeQuantizeConfigBase",
    "Float8FakeQuantizeConfig",
    "Int4WeightFakeQuantizeConfig",
    "IntxFakeQuantizeConfig",
    "infer_fake_quantize_configs",
    "same_numbers",
]

Configs = tuple[FakeQuantizeConfigBase | None, FakeQuantizeConfigBase]


def infer_fake_quantize_configs(base_config: Any) -> Configs:
    """Configurations of activations and of weights.

    Raises:
        ValueError: a configuration without a scheme, or with options whose numbers this library does not make.
    """
    try:
        scheme = scheme_of(base_config)
    except ValueError as error:
        raise ValueError(f"Unexpected base config: {base_config}; {error}") from error
    configs = _named(base_config)
    if configs is not None and _schemes(configs) == (_inner(scheme.activation), scheme.weight):
        return configs
    activation = None if scheme.activation is None else SchemeFakeQuantizeConfig(scheme.activation)
    return activation, SchemeFakeQuantizeConfig(scheme.weight)


# The name under which it is imported elsewhere.
_infer_fake_quantize_configs = infer_fake_quantize_configs


def same_numbers(one: Scheme, other: Scheme) -> bool:
    """Whether two schemes quantize alike, whatever they are called and however activations are arranged."""
    return (one.weight, _inner(one.activation)) == (other.weight, _inner(other.activation))


def _named(base: Any) -> Configs | None:
    match base:
        case Int4WeightOnlyConfig():
            return None, Int4WeightFakeQuantizeConfig(base.group_size, torch.bfloat16)
        case IntxWeightOnlyConfig():
            weight = _intx(base.weight_dtype, base.granularity, base.mapping_type, base.scale_dtype)
            return None if weight is None else (None, weight)
        case Int8DynamicActivationIntxWeightConfig():
            mapping, scale_dtype = base.weight_mapping_type, base.weight_scale_dtype
            weight = _intx(base.weight_dtype, base.weight_granularity, mapping, scale_dtype)
            return None if weight is None else (_int8_tokens(), weight)
        case Int8DynamicActivationInt4WeightConfig():
            weight = _intx(INT4, PerGroup(base.group_size), base.mapping_type, None)
            return None if weight is None else (_int8_tokens(), weight)
        case Float8DynamicActivationFloat8WeightConfig():
            return _float8(base)
        case Float8DynamicActivationInt4WeightConfig():
            return Float8FakeQuantizeConfig(), Int4WeightFakeQuantizeConfig()
        case MXDynamicActivationMXWeightConfig():
            config = MXFakeQuantizeConfig(base.weight_dtype, base.block_size, base.scaling_mode, base.kernel_preference)
            return config, config
        case NVFP4DynamicActivationNVFP4WeightConfig():
            two_level = base.use_dynamic_per_tensor_scale
            weight = NVFP4FakeQuantizeConfig(two_level, True, base.use_triton_kernel)
            return NVFP4FakeQuantizeConfig(two_level), weight
    return None


def _int8_tokens() -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)


def _intx(
    dtype: torch.dtype, granularity: Granularity, mapping: MappingType, scale_dtype: torch.dtype | None
) -> IntxFakeQuantizeConfig | None:
    if mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR:  # which the configuration does not know
        return None
    return IntxFakeQuantizeConfig(dtype, granularity, mapping, scale_precision=scale_dtype)


def _float8(base: Float8DynamicActivationFloat8WeightConfig) -> Configs | None:
    assert isinstance(base.granularity, list)
    of_activation, of_weight = base.granularity
    if isinstance(of_activation, PerBlock):
        return None
    bounds = base.activation_value_lb, base.activation_value_ub
    activation = Float8FakeQuantizeConfig(base.activation_dtype, of_activation, *bounds)
    return activation, Float8FakeQuantizeConfig(base.weight_dtype, of_weight)


def _schemes(configs: Configs) -> tuple[TensorScheme | None, TensorScheme]:
    activation, weight = configs
    return None if activation is None else activation.to_scheme(), weight.to_scheme()


def _inner(activation: TensorScheme | None) -> TensorScheme | None:
    """Fake quantizers take leading dimensions for rows of one matrix, as this wrapper does."""
    if isinstance(activation, FlatScheme) and not activation.one_row:
        return activation.inner
    return activation
