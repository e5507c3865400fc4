"""gguf-grid: a dense checkpoint whose weights lie on the Q4_0 grid, for llama.cpp.

llama.cpp has converters of its own, from dense Hugging Face checkpoints to GGUF and from there to Q4_0. Weights that
were trained on the Q4_0 grid and are written as they are on it go through both without a change: quantizing them again
finds the same codes and scales. The values need 15 significant bits (a float16 scale times 4 bits):

- float32, the default, holds them exactly;
- float16 rounds most of them, but the element that sets a block's scale is -8 times it, which is exact, and the others
  move by less than 2^-11, so that the same codes and scales come out: half the size, the same GGUF file;
- bfloat16 rounds the scales themselves, and is refused.

Verification quantizes what was read back once more and compares. `aotrain_grid` in config.json says which grid it is,
so that nothing quantizes the weights to another one by mistake.
"""

from typing import Any

import torch

from aotrain.export.base import ExportFormat, Layer, Plan, Reader
from aotrain.quantization.schemes import Encoded, Q40Scheme, Scheme

GRID_KEY = "aotrain_grid"


class GgufGrid(ExportFormat):
    """Layout of this module's docstring."""

    name = "gguf-grid"

    def refusal(self, scheme: Scheme) -> str | None:
        return None if isinstance(scheme.weight, Q40Scheme) else "gguf-grid carries the scheme q4_0 only"

    def refusal_of_embeddings(self, scheme: Scheme) -> str | None:
        return None

    def server_view(self, scheme: Scheme) -> str:
        return "a dense model; convert_hf_to_gguf.py, then llama-quantize Q4_0, which loses nothing"

    def served_dtype(self, source: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
        if dtype == torch.bfloat16:
            raise ValueError(
                "format gguf-grid got dtype bfloat16, which rounds the scales of Q4_0; want float32 or float16."
            )
        return dtype or torch.float32

    def pack(self, layer: Layer, scheme: Scheme, encoded: Encoded) -> dict[str, torch.Tensor]:
        values = scheme.weight.decode(encoded, layer.dtype)
        if not bool(values.isfinite().all()):
            raise ValueError(f"{layer.key} has values beyond the range of {layer.dtype} on the Q4_0 grid.")
        return {layer.key: values}

    def decode(self, layer: Layer, scheme: Scheme, read: Reader, part: slice) -> torch.Tensor:
        return read(layer.key)[part]

    def update_config(self, config: dict[str, Any], plan: Plan) -> None:
        config[GRID_KEY] = plan.scheme.name or "q4_0"


def survives_conversion(encoded: Encoded, stored: torch.Tensor) -> bool:
    """Whether a converter that quantizes stored weights to Q4_0 gets the values of the codes they were made from."""
    scheme = Q40Scheme()
    return torch.equal(scheme.values(stored.float()), scheme.decode(encoded, torch.float32))
