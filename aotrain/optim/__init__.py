"""Optimizers with low-bit state: drop-in replacements for `torch.optim.AdamW`."""

from aotrain.optim.adam import AdamW8bit

__all__ = ["AdamW8bit"]
