"""Autograd: the one layer that knows that a linear layer is three matrix products."""

from aotrain.ops.scaled_linear import (
    QuantizedWeight,
    WeightCasts,
    cast_weight,
    check_save_for_backward,
    scaled_linear,
    transpose_quantized,
)

__all__ = [
    "QuantizedWeight",
    "WeightCasts",
    "cast_weight",
    "check_save_for_backward",
    "scaled_linear",
    "transpose_quantized",
]
