"""scheme_of(config): what a base configuration means for the numbers, as one `Scheme`.

| configuration | weights | activations |
|---|---|---|
| `Int4WeightOnlyConfig` | 4-bit codes in groups, zero points that are values; float32 arithmetic | as they are |
| `IntxWeightOnlyConfig` | 1 to 8 bits per channel or in groups, in the dtype of the weight | as they are |
| `Int8DynamicActivationIntxWeightConfig` | the same | int8 per token |
| `Int8DynamicActivationInt4WeightConfig` | 4 bits in groups | int8 per token |
| `Int8WeightOnlyConfig` | int8 with float32 scales, per channel, tensor or group | as they are |
| `Int8DynamicActivationInt8WeightConfig` | int8 with float32 scales, per channel or tensor | int8 per token or tensor |
| `Float8WeightOnlyConfig` | float8 per channel, tensor or group | as they are |
| `Float8DynamicActivationFloat8WeightConfig` | float8 per channel, tensor or 128 x 128 | float8 likewise, or 1 x 128 |
| `Float8DynamicActivationInt4WeightConfig` | symmetric int4 in groups of 128, scales of amax / 8 | e4m3 per token |
| `MXDynamicActivationMXWeightConfig` | float8 or e2m1 in blocks of 32 with power-of-two scales | the same |
| `NVFP4DynamicActivationNVFP4WeightConfig`, `NVFP4WeightOnlyConfig` | NVFP4 | the same; as they are |

Scales and zero points of integer weights are in the dtype of the weight unless the table says otherwise, and codes are
chosen for the scales as they are stored. So what training sees is, bit for bit, what the stored codes decode to.
"""

from dataclasses import replace

import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    AffineFormat,
    ElementFormat,
    MappingType,
    Scaling,
    ZeroPointDomain,
    integer_format,
)
from aotrain.quantization.configs import (
    INT_DTYPES,
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
    Float8WeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from aotrain.quantization.granularity import Granularity, PerBlock, PerGroup, PerTensor
from aotrain.quantization.schemes import (
    SCHEMES,
    AffineScheme,
    FlatScheme,
    Int4Float8Scheme,
    Nvfp4Scheme,
    ScaledScheme,
    Scheme,
    TensorScheme,
)

# Smallest int8 scale of the configurations with float32 scales: theirs, so that codes agree.
_INT8_EPS = torch.finfo(torch.float32).eps
# Smallest scale of int4 weights with zero points; theirs is 1e-6 / 15. A power of two, so that zeros stay zeros also
# where float16 holds it as its smallest subnormal.
_INT4_EPS = 2.0**-24


def scheme_of(config: AOBaseConfig) -> Scheme:
    """The scheme of a base configuration.

    Raises:
        ValueError: a configuration without one: an option whose numbers this library does not make, or one that is not
            of a quantized model.
    """
    match config:
        case Int4WeightOnlyConfig():
            return _scheme(_int4(config))
        case IntxWeightOnlyConfig():
            _check_intx(config)
            mapping, scale_dtype = config.mapping_type, config.scale_dtype
            return _scheme(_intx(config.weight_dtype, config.granularity, mapping, scale_dtype))
        case Int8DynamicActivationIntxWeightConfig():
            _check_intx(config)
            mapping, scale_dtype = config.weight_mapping_type, config.weight_scale_dtype
            weight = _intx(config.weight_dtype, config.weight_granularity, mapping, scale_dtype)
            return _scheme(weight, _int8_tokens(config.act_mapping_type))
        case Int8DynamicActivationInt4WeightConfig():
            weight = _intx(INT_DTYPES[3], PerGroup(config.group_size), config.mapping_type, None)
            return _scheme(weight, _int8_tokens(config.act_mapping_type))
        case Int8WeightOnlyConfig():
            return _scheme(_int8(config.granularity))
        case Int8DynamicActivationInt8WeightConfig():
            of_activation, of_weight = config.granularities
            activation = _int8(of_activation, config.act_mapping_type, config.reduce_range)
            return _scheme(_int8(of_weight, reduce_range=config.reduce_range), activation)
        case Float8WeightOnlyConfig():
            assert config.granularity is not None
            return _scheme(_float8(config.weight_dtype, config.granularity))
        case Float8DynamicActivationFloat8WeightConfig():
            return _float8_both(config)
        case Float8DynamicActivationInt4WeightConfig():
            return _scheme(Int4Float8Scheme(), ScaledScheme(Scaling(element=FLOAT8_E4M3, block=ROWWISE)))
        case MXDynamicActivationMXWeightConfig():
            scale = SCALE_FORMATS[f"e8m0_{config.scaling_mode.value}"]
            element = _element(config.weight_dtype)
            same = ScaledScheme(Scaling(element=element, scale=scale, block=BLOCKWISE_1X32))
            return _scheme(same, same)
        case NVFP4DynamicActivationNVFP4WeightConfig():
            if config.step is not None:
                raise _refusal(config, f"step={config.step!r}", "None: scales of activations are made as they come")
            weight = Nvfp4Scheme(two_level=config.use_dynamic_per_tensor_scale)
            return _scheme(weight, FlatScheme(weight))
        case NVFP4WeightOnlyConfig():
            return _scheme(Nvfp4Scheme(two_level=config.use_dynamic_per_tensor_scale))
    raise ValueError(
        f"scheme_of got a {type(config).__name__}; want a base configuration of aotrain.quantization, such as "
        "IntxWeightOnlyConfig: others quantize no weights."
    )


def _scheme(weight: TensorScheme, activation: TensorScheme | None = None) -> Scheme:
    """With the name of the same scheme in the table, if it has one."""
    named = (scheme.name for scheme in SCHEMES.values() if (scheme.weight, scheme.activation) == (weight, activation))
    return Scheme(next(named, ""), weight, activation)


def _refusal(config: AOBaseConfig, got: str, want: str) -> ValueError:
    return ValueError(f"scheme_of got {type(config).__name__} with {got}; want {want}.")


def _int4(config: Int4WeightOnlyConfig) -> TensorScheme:
    if config.int4_choose_qparams_algorithm is not Int4ChooseQParamsAlgorithm.TINYGEMM:
        raise _refusal(config, "HQQ", "TINYGEMM: scales from the bounds of a group")
    fmt = AffineFormat(0, 15, group_size=config.group_size, domain=ZeroPointDomain.FLOAT)
    if config.int4_packing_format is Int4PackingFormat.TILE_PACKED_TO_4D:
        return AffineScheme(fmt)
    if config.int4_packing_format is Int4PackingFormat.PLAIN_INT32:
        raise _refusal(config, "PLAIN_INT32", "PLAIN: that layout is for other devices' kernels")
    return AffineScheme(replace(fmt, compute_dtype=torch.float32, eps=_INT4_EPS))


def _intx(
    dtype: torch.dtype, granularity: Granularity, mapping: MappingType, scale_dtype: torch.dtype | None
) -> TensorScheme:
    group_size = granularity.group_size if isinstance(granularity, PerGroup) else None
    bits = INT_DTYPES.index(dtype) + 1
    if bits == 1 and mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
        raise ValueError("scheme_of got int1 with SYMMETRIC_NO_CLIPPING_ERR; want SYMMETRIC: -1 and 0 have no maximum.")
    return AffineScheme(integer_format(bits, group_size=group_size, mapping=mapping, scale_dtype=scale_dtype))


def _check_intx(config: IntxWeightOnlyConfig | Int8DynamicActivationIntxWeightConfig) -> None:
    if config.intx_packing_format is not IntxPackingFormat.UNPACKED_TO_INT8:
        raise _refusal(
            config, config.intx_packing_format.name, "UNPACKED_TO_INT8: the others are layouts of Arm kernels"
        )
    if config.intx_choose_qparams_algorithm is not IntxChooseQParamsAlgorithm.AFFINE:
        raise _refusal(config, str(config.intx_choose_qparams_algorithm), "AFFINE: scales from the bounds of a group")


def _int8_tokens(mapping: MappingType) -> TensorScheme:
    if mapping is MappingType.ASYMMETRIC:
        return AffineScheme(integer_format(8, mapping=mapping))
    symmetric = SCHEMES["int8"].activation
    assert symmetric is not None
    return symmetric


def _int8(
    granularity: Granularity, mapping: MappingType = MappingType.SYMMETRIC, reduce_range: bool = False
) -> TensorScheme:
    lo, hi = (-64, 63) if reduce_range else (-128, 127)
    group_size = granularity.group_size if isinstance(granularity, PerGroup) else None
    fmt = AffineFormat(lo, hi, group_size=group_size, mapping=mapping, scale_dtype=torch.float32, eps=_INT8_EPS)
    scheme = AffineScheme(fmt)
    return FlatScheme(scheme, one_row=True) if isinstance(granularity, PerTensor) else scheme


def _float8(dtype: torch.dtype, granularity: Granularity) -> ScaledScheme:
    match granularity:
        case PerTensor():
            block = TENSORWISE
        case PerGroup(group_size):
            block = (1, group_size)
        case PerBlock(block_size):
            rows, columns = block_size
            block = (rows, columns)
        case _:
            block = ROWWISE
    return ScaledScheme(Scaling(element=_element(dtype), block=block))


def _float8_both(config: Float8DynamicActivationFloat8WeightConfig) -> Scheme:
    if config.packing_format is not Float8PackingFormat.PLAIN:
        raise _refusal(config, config.packing_format.name, "PLAIN: weights here are dense")
    assert isinstance(config.granularity, list)
    of_activation, of_weight = config.granularity
    activation: TensorScheme = replace(
        _float8(config.activation_dtype, of_activation),
        amax_min=config.activation_value_lb,
        amax_max=config.activation_value_ub,
    )
    if isinstance(of_activation, PerTensor):
        activation = FlatScheme(activation)
    return _scheme(_float8(config.weight_dtype, of_weight), activation)


def _element(dtype: torch.dtype) -> ElementFormat:
    if dtype == torch.float4_e2m1fn_x2:
        return FLOAT4_E2M1
    return ELEMENT_FORMATS[str(dtype).removeprefix("torch.")]
