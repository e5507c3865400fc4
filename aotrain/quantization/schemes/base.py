"""TensorScheme: everything that happens to one tensor, in one object, so that training and serving cannot drift.

A scheme encodes a tensor into codes and scales, decodes them, and gives the values that training sees in its place,
which are by definition the decoded codes: `values(x) == decode(encode(x))`, bit for bit. Layers, exporters and fake
quantizers hold a scheme and have no arithmetic of their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Encoded(NamedTuple):
    """A quantized tensor as plain tensors.

    Attributes:
        data: codes, one element per code whatever its width: int8, uint8 or float8, in the shape of the tensor.
        scale: as the scheme says; multiplies on decoding.
        zero_point: codes, or values in the FLOAT domain; None where the scheme has none.
        global_scale: float32, the upper level of two-level scales; None where the scheme has one level.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


class TensorScheme(ABC):
    """How one tensor is quantized. Subclasses are frozen dataclasses: hashable, comparable, printable."""

    @abstractmethod
    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        """Codes and scales of a tensor, without gradient.

        Args:
            x: [..., K] float32, bfloat16 or float16.
            scale: scales to use instead of those of x's own blocks.
            zero_point: goes with `scale`.
            global_scale: upper level to use instead of x's own.

        Raises:
            ValueError: a shape that the scheme cannot take (`problem` says so beforehand), or scales that do not fit.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Values of codes in a floating dtype."""

    @abstractmethod
    def problem(self, shape: Sequence[int]) -> str | None:
        """Why a tensor of this shape cannot be encoded, with the remedy; None when it can."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code in `Encoded.data`, seen as integers: what it takes to store one."""
        return 0, 255

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """What x becomes when it is encoded and decoded, in x's dtype, without gradient."""
        return self.decode(self.encode(x), x.dtype)

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gradient of x from that of `values(x)`: straight through, less what saturates.

        Args:
            grad: in the shape of x, any floating dtype; not modified.
            x: what was encoded.
        """
        return grad

    def marked_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`values` for a backward pass, and what spares `pass_gradient_` a look at x; None: nothing does."""
        return self.values(x), None

    def pass_gradient_(
        self, grad: torch.Tensor, x: torch.Tensor, saturated: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`pass_gradient` of a grad that nobody else needs: may write into it, and returns it or another tensor.

        Args:
            grad: as for `pass_gradient`.
            x: what was encoded.
            saturated: what `marked_values(x)` returned; None is always right.
        """
        return self.pass_gradient(grad, x)


def refuse_given(scheme: TensorScheme, **given: torch.Tensor | None) -> None:
    """Raise ValueError for scales that a scheme has no use for."""
    for name, tensor in given.items():
        if tensor is not None:
            raise ValueError(f"{scheme} got a {name}; it has none: leave it out.")
