"""Quantization: schemes of tensors, and `quantize_`, one call that applies a configuration to a model."""

from aotrain.quantization.quantize import quantize_, register_quantize_handler
from aotrain.quantization.schemes import SCHEMES, Scheme, get_scheme

__all__ = ["SCHEMES", "Scheme", "get_scheme", "quantize_", "register_quantize_handler"]
