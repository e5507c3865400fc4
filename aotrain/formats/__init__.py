"""Number formats and casts in plain torch: the definition of truth, on any device.

Everything else in aotrain (Triton kernels, native code, modules, exporters) must reproduce these functions bit for bit.
`docs/numerics.md` is the normative text; the code here is its executable form.

One convention, everywhere: **a scale multiplies on dequantize**, `x ~= data * scale`. Its reciprocal, the factor that
quantization applies, is called `inv_scale`.
"""

from aotrain.formats.affine import AffineFormat, AffineTensor, MappingType, ZeroPointDomain, integer_format
from aotrain.formats.cast import ScaledTensor, dequantize, fake_quantize, quantize
from aotrain.formats.decode import decode_elements
from aotrain.formats.element import (
    BFLOAT16,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2FNUZ,
    INT8,
    ElementFormat,
)
from aotrain.formats.hadamard import hadamard_signs, hadamard_transform, inverse_hadamard_transform
from aotrain.formats.mx import is_mx, quantize_mx
from aotrain.formats.nvfp4 import Nvfp4Tensor, dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4
from aotrain.formats.packing import pack_codes, pack_float4, unpack_codes, unpack_float4
from aotrain.formats.random import data_key, philox_bits16, philox_u32
from aotrain.formats.rounding import round_nearest, round_stochastic
from aotrain.formats.scale_layout import blocked_size, from_blocked, to_blocked
from aotrain.formats.scaling import (
    BLOCKWISE_1X16,
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_16X16,
    BLOCKWISE_128X128,
    COLWISE,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaleFormat,
    Scaling,
    scale_shape,
)

__all__ = [
    "BFLOAT16",
    "BLOCKWISE_1X16",
    "BLOCKWISE_1X32",
    "BLOCKWISE_1X128",
    "BLOCKWISE_16X16",
    "BLOCKWISE_128X128",
    "COLWISE",
    "ELEMENT_FORMATS",
    "FLOAT4_E2M1",
    "FLOAT6_E2M3",
    "FLOAT6_E3M2",
    "FLOAT8_E4M3",
    "FLOAT8_E4M3FNUZ",
    "FLOAT8_E5M2",
    "FLOAT8_E5M2FNUZ",
    "INT8",
    "ROWWISE",
    "SCALE_FORMATS",
    "TENSORWISE",
    "AffineFormat",
    "AffineTensor",
    "ElementFormat",
    "MappingType",
    "Nvfp4Tensor",
    "ScaleFormat",
    "ScaledTensor",
    "Scaling",
    "ZeroPointDomain",
    "blocked_size",
    "data_key",
    "decode_elements",
    "dequantize",
    "dequantize_nvfp4",
    "fake_quantize",
    "from_blocked",
    "hadamard_signs",
    "hadamard_transform",
    "integer_format",
    "inverse_hadamard_transform",
    "is_mx",
    "nvfp4_global_scale",
    "pack_codes",
    "pack_float4",
    "philox_bits16",
    "philox_u32",
    "quantize",
    "quantize_mx",
    "quantize_nvfp4",
    "round_nearest",
    "round_stochastic",
    "scale_shape",
    "to_blocked",
    "unpack_codes",
    "unpack_float4",
]
