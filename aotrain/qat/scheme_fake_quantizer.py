"""SchemeFakeQuantizer: a scheme of a tensor with a switch, for modules whose fake quantization is turned on and off.

A module without parameters and buffers, so that state dicts are those of the model without it. Whoever computes asks
for its `arithmetic` on every call; a schedule, or a user, sets `enabled`.
"""

import torch

from aotrain.ops.fake_quantize import FakeQuantizer, fake_quantize
from aotrain.quantization.schemes import TensorScheme


class SchemeFakeQuantizer(torch.nn.Module):
    """Gives the values of a scheme's codes, with straight-through gradients; switched off, its input.

    Attributes:
        scheme: of the tensor.
        enabled: whether it quantizes.
    """

    def __init__(self, scheme: TensorScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.enabled = True

    def arithmetic(self, x: torch.Tensor) -> FakeQuantizer | None:
        """What would happen to x now, for operations that fuse it; None: nothing."""
        return self.scheme if self.enabled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scheme) if self.enabled else x

    def extra_repr(self) -> str:
        return f"{self.scheme}" + ("" if self.enabled else ", enabled=False")


def fake_quantizer_of(scheme: TensorScheme | None) -> SchemeFakeQuantizer | None:
    """A fake quantizer, switched on; None for a tensor that has no scheme."""
    return None if scheme is None else SchemeFakeQuantizer(scheme)
