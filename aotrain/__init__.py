"""Training-time low precision for PyTorch: float8 and MX linear training and low-bit optimizers.

    from aotrain import convert_to_float8_training, Float8LinearConfig
    from aotrain.optim import AdamW8bit
    from aotrain.qat import QATConfig
    from aotrain.quantization import quantize_

Importing this package touches no device, compiles nothing and reads no environment. Names are loaded on first use, so
the command line can check a job file before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aotrain.nn import (
        CastConfig,
        Float8GemmConfig,
        Float8Linear,
        Float8LinearConfig,
        Float8LinearRecipeName,
        ScalingGranularity,
        ScalingType,
        conversion_report,
        convert_moe_training,
        convert_to_float8_training,
        convert_to_mx_training,
        unconvert,
    )
    from aotrain.optim import AdamW8bit
    from aotrain.quantization import quantize_
    from aotrain.recipes import RECIPES, get_recipe

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "AdamW8bit": "aotrain.optim",
    "CastConfig": "aotrain.nn",
    "Float8GemmConfig": "aotrain.nn",
    "Float8Linear": "aotrain.nn",
    "Float8LinearConfig": "aotrain.nn",
    "Float8LinearRecipeName": "aotrain.nn",
    "QATConfig": "aotrain.qat",
    "RECIPES": "aotrain.recipes",
    "ScalingGranularity": "aotrain.nn",
    "ScalingType": "aotrain.nn",
    "conversion_report": "aotrain.nn",
    "convert_moe_training": "aotrain.nn",
    "convert_to_float8_training": "aotrain.nn",
    "convert_to_mx_training": "aotrain.nn",
    "get_recipe": "aotrain.recipes",
    "quantize_": "aotrain.quantization",
    "unconvert": "aotrain.nn",
}

__all__ = [
    "RECIPES",
    "AdamW8bit",
    "CastConfig",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "QATConfig",
    "ScalingGranularity",
    "ScalingType",
    "__version__",
    "conversion_report",
    "convert_moe_training",
    "convert_to_float8_training",
    "convert_to_mx_training",
    "get_recipe",
    "quantize_",
    "unconvert",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
