"""Autograd: the one layer that knows that a linear layer is three matrix products."""

from aotrain.ops.scaled_linear import scaled_linear

__all__ = ["scaled_linear"]
