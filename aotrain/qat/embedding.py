"""Embeddings that train through quantization: `nn.Embedding` with a fake quantizer of the weight.

Where the scheme quantizes row by row, only the rows that are looked up are quantized; values and gradients are those of
looking up in the quantized table.
"""

from typing import Any, Self

import torch

from aotrain.nn.float8_linear import clone_as
from aotrain.qat.fake_quantizer import FakeQuantizerBase, is_row_local, refuse_late_range
from aotrain.qat.tensor_config import INT4, FakeQuantizeConfigBase, IntxFakeQuantizeConfig


class FakeQuantizedEmbedding(torch.nn.Embedding):
    """Embedding with fake quantization.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: K.
        padding_idx: as in `nn.Embedding`, as are the next four.
        max_norm: rows are renormalized before they are quantized.
        norm_type: of max_norm.
        scale_grad_by_freq: divide gradients by the counts of a batch.
        sparse: make a sparse gradient.
        weight_config: of the table; None: left as it is.
        *args: further positional arguments of `nn.Embedding`.
        **kwargs: further keyword arguments of `nn.Embedding`.

    Attributes:
        weight_fake_quantizer: module or None.

    Raises:
        ValueError: a scheme that cannot take a table of this size.
    """

    weight_fake_quantizer: FakeQuantizerBase | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        weight_config: FakeQuantizeConfigBase | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, *args, **kwargs
        )
        self._set_fake_quantizer(weight_config)

    @classmethod
    def from_embedding(cls, mod: torch.nn.Embedding, weight_config: FakeQuantizeConfigBase | None = None) -> Self:
        """An embedding with the same Parameter object, hooks, buffers and training flag as `mod`."""
        new = clone_as(mod, cls)
        new._set_fake_quantizer(weight_config)
        return new

    def to_embedding(self) -> torch.nn.Embedding:
        """The plain embedding with the same Parameter object, in high precision."""
        new = clone_as(self, torch.nn.Embedding)
        for contents in (new._modules, new.__dict__):  # None is a plain attribute
            contents.pop("weight_fake_quantizer", None)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices [...] -> [..., K]."""
        quantizer = self.weight_fake_quantizer
        if quantizer is None or not quantizer.enabled:
            return super().forward(input)
        if is_row_local(quantizer.scheme) and quantizer.is_dynamic:
            return quantizer(super().forward(input))
        table = quantizer(self.weight)
        return torch.nn.functional.embedding(
            input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Turn the fake quantizer on or off."""
        if self.weight_fake_quantizer is not None:
            self.weight_fake_quantizer.enabled = enabled

    def disable_fake_quant(self) -> None:
        """Turn the fake quantizer off."""
        self.enable_fake_quant(False)

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        refuse_late_range(self.weight, self.weight_fake_quantizer, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set_fake_quantizer(self, weight_config: FakeQuantizeConfigBase | None) -> None:
        self.weight_fake_quantizer = None if weight_config is None else FakeQuantizerBase.from_config(weight_config)
        if self.weight_fake_quantizer is None:
            return
        problem = self.weight_fake_quantizer.scheme.problem(tuple(self.weight.shape))
        if problem is not None:
            raise ValueError(f"{type(self).__name__} got a table that its scheme cannot take: {problem}.")


class Int4WeightOnlyQATEmbedding(FakeQuantizedEmbedding):
    """Embedding with symmetric int4 rows in groups: what `Int4WeightOnlyEmbeddingQATQuantizer` makes.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: K.
        padding_idx: as in `nn.Embedding`, as are the next four.
        max_norm: see `FakeQuantizedEmbedding`.
        norm_type: of max_norm.
        scale_grad_by_freq: see `FakeQuantizedEmbedding`.
        sparse: see `FakeQuantizedEmbedding`.
        group_size: elements of a row that share a scale.
        scale_precision: dtype of the scales.
        zero_point_precision: dtype of zero points, of which there are none.
        *args: further positional arguments of `nn.Embedding`.
        **kwargs: further keyword arguments of `nn.Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        group_size: int = 32,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config = int4_group_config(group_size, scale_precision, zero_point_precision)
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        super().__init__(num_embeddings, embedding_dim, *options, config, *args, **kwargs)


def int4_group_config(
    group_size: int, scale_precision: torch.dtype, zero_point_precision: torch.dtype = torch.int32
) -> IntxFakeQuantizeConfig:
    """Symmetric int4 in groups."""
    return IntxFakeQuantizeConfig(
        INT4,
        group_size=group_size,
        scale_precision=scale_precision,
        zero_point_precision=zero_point_precision,
    )
