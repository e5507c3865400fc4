"""Quantization: schemes of tensors, base configurations, and `quantize_`, one call that applies one to a model."""

from aotrain.formats import MappingType, ZeroPointDomain
from aotrain.quantization.configs import (
    AOBaseConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from aotrain.quantization.enums import (
    Float8PackingFormat,
    Int4ChooseQParamsAlgorithm,
    Int4PackingFormat,
    IntxChooseQParamsAlgorithm,
    IntxPackingFormat,
)
from aotrain.quantization.float_configs import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8MMConfig,
    Float8WeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from aotrain.quantization.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    get_block_size,
)
from aotrain.quantization.modules import QuantizedEmbedding, QuantizedLinear, QuantizedModule
from aotrain.quantization.products import fast_products
from aotrain.quantization.quantize import quantize_, register_quantize_handler
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import SCHEMES, Scheme, get_scheme

__all__ = [
    "SCHEMES",
    "AOBaseConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8MMConfig",
    "Float8PackingFormat",
    "Float8WeightOnlyConfig",
    "Granularity",
    "Int4ChooseQParamsAlgorithm",
    "Int4PackingFormat",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8WeightOnlyConfig",
    "IntxChooseQParamsAlgorithm",
    "IntxPackingFormat",
    "IntxWeightOnlyConfig",
    "MXDynamicActivationMXWeightConfig",
    "MappingType",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4WeightOnlyConfig",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "Scheme",
    "ZeroPointDomain",
    "fast_products",
    "get_block_size",
    "get_scheme",
    "quantize_",
    "register_quantize_handler",
    "scheme_of",
]
