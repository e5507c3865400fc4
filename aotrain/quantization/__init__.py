"""quantize_: one call that applies a configuration to a model, whatever the configuration is of."""

from aotrain.quantization.quantize import quantize_, register_quantize_handler

__all__ = ["quantize_", "register_quantize_handler"]
