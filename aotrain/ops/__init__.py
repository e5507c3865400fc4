"""Autograd: the one layer that knows that a linear layer is three matrix products."""

from aotrain.ops.nvfp4_grouped_mm import Nvfp4Method, nvfp4_grouped_mm
from aotrain.ops.nvfp4_linear import Nvfp4Recipe, nvfp4_linear
from aotrain.ops.permute import (
    generate_permute_indices,
    pad_token_groups,
    permute,
    permute_and_pad,
    unpad_token_groups,
    unpermute,
)
from aotrain.ops.quantized_all_to_all import (
    PAYLOADS,
    Payload,
    QuantizedRows,
    all_to_all_combine,
    all_to_all_dispatch,
    all_to_all_dispatch_quantized,
    dequantize_rows,
    permute_quantized,
)
from aotrain.ops.scaled_grouped_mm import grouped_recipe, scaled_grouped_mm
from aotrain.ops.scaled_linear import (
    OperandCasts,
    QuantizedWeight,
    WeightCasts,
    cast_operand,
    cast_weight,
    check_save_for_backward,
    scaled_linear,
    transpose_quantized,
)

__all__ = [
    "PAYLOADS",
    "Nvfp4Method",
    "Nvfp4Recipe",
    "OperandCasts",
    "Payload",
    "QuantizedRows",
    "QuantizedWeight",
    "WeightCasts",
    "all_to_all_combine",
    "all_to_all_dispatch",
    "all_to_all_dispatch_quantized",
    "cast_operand",
    "cast_weight",
    "check_save_for_backward",
    "dequantize_rows",
    "generate_permute_indices",
    "grouped_recipe",
    "nvfp4_grouped_mm",
    "nvfp4_linear",
    "pad_token_groups",
    "permute",
    "permute_and_pad",
    "permute_quantized",
    "scaled_grouped_mm",
    "scaled_linear",
    "transpose_quantized",
    "unpad_token_groups",
    "unpermute",
]
