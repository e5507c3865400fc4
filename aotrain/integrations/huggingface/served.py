"""A checkpoint as transformers reads it, for engines that train with something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def served_logits(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function of tokens [B, L], one document each from the left, to logits [B, L, vocabulary].

    Args:
        folder: dense or quantized checkpoint.
        dtype: of the products.
        device: of tokens and logits.

    Raises:
        ImportError: transformers needs another package for it.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits
