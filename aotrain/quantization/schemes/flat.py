"""A scheme of activations that looks at all leading dimensions at once.

Schemes with a scale per matrix would give every sequence of a batch [B, T, K] its own. A layer's result must not depend
on how its rows are arranged, so they are made one matrix first: one scale for all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aotrain.quantization.schemes.base import Encoded, TensorScheme


@dataclass(frozen=True, slots=True)
class FlatScheme(TensorScheme):
    """Another scheme, of the tensor as a matrix of its last dimension.

    Attributes:
        inner: the scheme. Its scales have the shape that they have for the matrix.
        one_row: take the tensor as a matrix of one row, so that a scale per row is one of the whole tensor.
    """

    inner: TensorScheme
    one_row: bool = False

    def encode(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> Encoded:
        matrix = x.reshape(self._matrix(x.shape))
        encoded = self.inner.encode(matrix, scale=scale, zero_point=zero_point, global_scale=global_scale)
        return encoded._replace(data=encoded.data.reshape(x.shape))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        shape = encoded.data.shape
        return self.inner.decode(encoded._replace(data=encoded.data.reshape(self._matrix(shape))), dtype).reshape(shape)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.inner.code_range

    def problem(self, shape: Sequence[int]) -> str | None:
        return self.inner.problem((1, *shape[-1:]))

    def pass_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shape = self._matrix(x.shape)
        return self.inner.pass_gradient(grad.reshape(shape), x.reshape(shape)).reshape(x.shape)

    def _matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return (1, rows * shape[-1]) if self.one_row else (rows, shape[-1])
