"""Export: checkpoints of models that trained through quantization, in the formats that servers read.

`export` quantizes the linear layers of a dense Hugging Face checkpoint folder, with the scheme that the model was
trained with, reads the result back and compares it with what training saw, bit for bit. It works on the checkpoint's
keys, so it needs no model code, and some rows of a tensor in memory at a time. `describe_export` says beforehand what a
server will see. `float8_block_weights` streams a model's weights in a serving format instead, without a file.

There is no arithmetic here: codes and values are those of `aotrain.quantization.schemes`.
"""

from aotrain.export.description import describe_export
from aotrain.export.exporter import export
from aotrain.export.float8_block import float8_block_weights
from aotrain.export.report import ExportReport, LayerReport
from aotrain.export.table import FORMATS, formats_for

__all__ = [
    "FORMATS",
    "ExportReport",
    "LayerReport",
    "describe_export",
    "export",
    "float8_block_weights",
    "formats_for",
]
