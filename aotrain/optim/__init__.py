"""Optimizers with low-bit state, drop-in replacements for `torch.optim.AdamW`, and CPU offload of any optimizer."""

from aotrain.optim.adam import (
    Adam4bit,
    Adam8bit,
    Adam32bit,
    AdamFp8,
    AdamW4bit,
    AdamW8bit,
    AdamW32bit,
    AdamWFp8,
)
from aotrain.optim.convert import convert_state
from aotrain.optim.cpu_offload import CPUOffloadOptimizer
from aotrain.optim.groups import precision_groups
from aotrain.optim.lion import Lion8bit
from aotrain.optim.muon import Muon8bit

# The name that float32 AdamW with stochastic rounding has elsewhere.
_AdamW = AdamW32bit

__all__ = [
    "Adam4bit",
    "Adam8bit",
    "Adam32bit",
    "AdamFp8",
    "AdamW4bit",
    "AdamW8bit",
    "AdamW32bit",
    "AdamWFp8",
    "CPUOffloadOptimizer",
    "Lion8bit",
    "Muon8bit",
    "convert_state",
    "precision_groups",
]
