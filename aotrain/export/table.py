"""The export formats by name, and which of them carry a scheme."""

import difflib

from aotrain.export.base import ExportFormat
from aotrain.export.compressed_tensors import CompressedTensors
from aotrain.export.float8_block import Float8Block
from aotrain.export.gguf_grid import GgufGrid
from aotrain.export.torchao import TorchAo
from aotrain.quantization.schemes import Scheme

FORMATS: dict[str, ExportFormat] = {
    each.name: each for each in (CompressedTensors(), TorchAo(), GgufGrid(), Float8Block())
}


def get_format(name: str) -> ExportFormat:
    """The format of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"export got format {name!r}; {hint}want one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def formats_for(scheme: Scheme) -> list[str]:
    """Names of the formats that carry a scheme."""
    return [name for name, each in FORMATS.items() if each.refusal(scheme) is None]


def check_format(chosen: ExportFormat, scheme: Scheme) -> None:
    """Raise ValueError, with the reason and what would do, if a format does not carry a scheme."""
    reason = chosen.refusal(scheme)
    if reason is not None:
        others = ", ".join(formats_for(scheme)) or "none"
        raise ValueError(
            f"export got scheme {scheme.name or scheme} with format {chosen.name}: {reason}. Formats that carry this "
            f"scheme: {others}."
        )
