"""The torch.library namespace that all ops of this package register in."""

import torch

LIBRARY = torch.library.Library("aotrain", "DEF")
