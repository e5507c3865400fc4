"""Quantization: schemes of tensors, base configurations, and `quantize_`, one call that applies one to a model."""

from aotrain.formats import MappingType, ZeroPointDomain
from aotrain.quantization.config_json import config_from_dict, config_to_dict
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
from aotrain.quantization.fqn_config import AOPerModuleConfig, FqnToConfig, ModuleFqnToConfig, fqn_matches_fqn_config
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
from aotrain.quantization.post_training import quantize_layers
from aotrain.quantization.products import fast_products
from aotrain.quantization.quant_primitives import (
    choose_qparams_affine,
    dequantize_affine,
    get_group_qparams_symmetric,
    quantize_affine,
)
from aotrain.quantization.quantize import quantize_, register_quantize_handler
from aotrain.quantization.scheme_of import scheme_of
from aotrain.quantization.schemes import SCHEMES, Scheme, get_scheme

__all__ = [
    "SCHEMES",
    "AOBaseConfig",
    "AOPerModuleConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8MMConfig",
    "Float8PackingFormat",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
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
    "ModuleFqnToConfig",
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
    "choose_qparams_affine",
    "config_from_dict",
    "config_to_dict",
    "dequantize_affine",
    "fast_products",
    "fqn_matches_fqn_config",
    "get_block_size",
    "get_group_qparams_symmetric",
    "get_scheme",
    "quantize_",
    "quantize_affine",
    "quantize_layers",
    "register_quantize_handler",
    "scheme_of",
]
