"""Two-step quantizers: `prepare(model)`, train, `convert(model)`; the interface before `QATConfig`.

Both calls work in place and return the model. Converted layers are those of `quantization.modules`, whatever kernel a
quantizer was named for, and give what the prepared ones gave.

| quantizer | layers | weights | inputs |
|---|---|---|---|
| `Int8DynActInt4WeightQATQuantizer` | linear | symmetric int4 in groups | asymmetric int8 per token |
| `Int4WeightOnlyQATQuantizer` | linear without bias | 4 bits in groups, zero points that are values | as they are |
| `Int4WeightOnlyEmbeddingQATQuantizer` | embeddings | symmetric int4 in groups | |
| `Float8ActInt4WeightQATQuantizer` | linear | symmetric int4 in groups or per channel | e4m3 per token |
| `ComposableQATQuantizer` | those of its members | | |

Layers whose size the group size does not divide are left alone.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch

from aotrain.qat.convert import nothing_prepared, quantized
from aotrain.qat.embedding import FakeQuantizedEmbedding, Int4WeightOnlyQATEmbedding, int4_group_config
from aotrain.qat.linear import (
    FakeQuantizedLinear,
    Int4WeightOnlyQATLinear,
    Int8DynActInt4WeightQATLinear,
    int8_token_config,
    uint4_group_config,
)
from aotrain.qat.swap import swap, unsupported
from aotrain.qat.tensor_config import INT4, FakeQuantizeConfigBase, Float8FakeQuantizeConfig, IntxFakeQuantizeConfig


class TwoStepQuantizer(ABC):
    """Prepares a model for training through quantization, and converts it afterwards."""

    @abstractmethod
    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Fake-quantize the layers that this quantizer is for, in place."""

    @abstractmethod
    def convert(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Quantize the layers that this quantizer has prepared, in place."""


class _LinearQuantizer(TwoStepQuantizer):
    """Of linear layers; subclasses give the class and the configurations."""

    layer_class: type[FakeQuantizedLinear]

    def get_activation_fake_quantize_config(self) -> FakeQuantizeConfigBase | None:
        """Of inputs; None: left as they are."""
        return None

    @abstractmethod
    def get_weight_fake_quantize_config(self) -> FakeQuantizeConfigBase:
        """Of weights."""

    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Swap linear layers for fake-quantized ones with the same parameters.

        Raises:
            ValueError: there is no layer to prepare.
        """
        activation, weight = self.get_activation_fake_quantize_config(), self.get_weight_fake_quantize_config()
        scheme = weight.to_scheme()
        layers = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and unsupported(module) is None and self._takes(module)
        ]
        fitting = [module for module in layers if scheme.problem(tuple(module.weight.shape)) is None]
        if not fitting:
            raise ValueError(
                f"{type(self).__name__} found no layer to prepare among {len(layers)}; want plain linear layers whose "
                f"in_features are a multiple of the group size."
            )
        swap(model, {module: self.layer_class.from_linear(module, activation, weight) for module in fitting})
        return model

    def convert(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Swap the prepared layers for quantized ones.

        Raises:
            ValueError: there is none.
        """
        return _convert(model, self.layer_class, type(self).__name__)

    def _takes(self, module: torch.nn.Linear) -> bool:
        return True


class Int8DynActInt4WeightQATQuantizer(_LinearQuantizer):
    """Symmetric int4 weights in groups, asymmetric int8 inputs per token.

    Args:
        groupsize: inputs that share a scale of the weight.
        padding_allowed: False; padded layers have no place to keep what was trained.
        precision: kept for callers that set it; layers keep the dtype they have.
        scales_precision: dtype of the weights' scales.

    Raises:
        ValueError: padding_allowed.
    """

    layer_class = Int8DynActInt4WeightQATLinear

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        if padding_allowed:
            raise ValueError(
                "Int8DynActInt4WeightQATQuantizer got padding_allowed=True; want False, and a groupsize that divides "
                "in_features: other layers are left alone."
            )
        self.groupsize = groupsize
        self.padding_allowed = padding_allowed
        self.precision = precision
        self.scales_precision = scales_precision

    def get_activation_fake_quantize_config(self) -> IntxFakeQuantizeConfig:
        return int8_token_config()

    def get_weight_fake_quantize_config(self) -> IntxFakeQuantizeConfig:
        return int4_group_config(self.groupsize, self.scales_precision, self.scales_precision)


class Int4WeightOnlyQATQuantizer(_LinearQuantizer):
    """Weights of 4 bits in groups, with zero points that are values; layers with a bias are left alone.

    Args:
        groupsize: 32, 64, 128 or 256.
        inner_k_tiles: 2, 4 or 8; of a kernel's layout, no effect.
        precision: kept for callers that set it; layers keep the dtype they have.
        scales_precision: dtype of scales and zero points.

    Raises:
        ValueError: another groupsize or inner_k_tiles, or scales_precision that is not bfloat16.
    """

    layer_class = Int4WeightOnlyQATLinear

    def __init__(
        self,
        groupsize: int = 256,
        inner_k_tiles: int | None = 8,
        precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:
        if inner_k_tiles not in (2, 4, 8) or groupsize not in (32, 64, 128, 256) or scales_precision != torch.bfloat16:
            raise ValueError(
                f"Int4WeightOnlyQATQuantizer got groupsize={groupsize}, inner_k_tiles={inner_k_tiles}, "
                f"scales_precision={scales_precision}; want 32, 64, 128 or 256; 2, 4 or 8; torch.bfloat16."
            )
        self.groupsize = groupsize
        self.inner_k_tiles = inner_k_tiles
        self.precision = precision
        self.scales_precision = scales_precision

    def get_weight_fake_quantize_config(self) -> IntxFakeQuantizeConfig:
        return uint4_group_config(self.groupsize, self.scales_precision)

    def _takes(self, module: torch.nn.Linear) -> bool:
        return module.bias is None


class Float8ActInt4WeightQATQuantizer(_LinearQuantizer):
    """Symmetric int4 weights, e4m3 inputs per token.

    Args:
        group_size: inputs that share a scale of the weight; None: per channel.
        scale_precision: dtype of the weights' scales.
    """

    layer_class = FakeQuantizedLinear

    def __init__(self, group_size: int | None = 64, scale_precision: torch.dtype = torch.bfloat16) -> None:
        self.group_size = group_size
        self.scale_precision = scale_precision

    def get_activation_fake_quantize_config(self) -> Float8FakeQuantizeConfig:
        return Float8FakeQuantizeConfig()

    def get_weight_fake_quantize_config(self) -> IntxFakeQuantizeConfig:
        if self.group_size is not None:
            return int4_group_config(self.group_size, self.scale_precision)
        return IntxFakeQuantizeConfig(INT4, "per_channel", scale_precision=self.scale_precision)


class Int4WeightOnlyEmbeddingQATQuantizer(TwoStepQuantizer):
    """Symmetric int4 embeddings in groups.

    Args:
        group_size: elements of a row that share a scale.
        scale_precision: dtype of the scales.
        zero_point_precision: dtype of zero points, of which there are none.
    """

    def __init__(
        self,
        group_size: int = 256,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
    ) -> None:
        self.bit_width = 4
        self.group_size = group_size
        self.scale_precision = scale_precision
        self.zero_point_precision = zero_point_precision

    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Swap embeddings for fake-quantized ones with the same parameters.

        Raises:
            ValueError: there is none that the group size divides.
        """
        config = int4_group_config(self.group_size, self.scale_precision, self.zero_point_precision)
        fitting = [
            module
            for module in model.modules()
            if type(module) is torch.nn.Embedding and module.embedding_dim % self.group_size == 0
        ]
        if not fitting:
            raise ValueError(
                f"{type(self).__name__} found no embedding to prepare; want an nn.Embedding whose embedding_dim is a "
                f"multiple of {self.group_size}."
            )
        swap(model, {module: Int4WeightOnlyQATEmbedding.from_embedding(module, config) for module in fitting})
        return model

    def convert(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Swap the prepared embeddings for quantized ones.

        Raises:
            ValueError: there is none.
        """
        return _convert(model, Int4WeightOnlyQATEmbedding, type(self).__name__)


class ComposableQATQuantizer(TwoStepQuantizer):
    """Several quantizers, one after the other.

    Args:
        quantizers: each for layers of its own.
    """

    def __init__(self, quantizers: list[TwoStepQuantizer]) -> None:
        self.quantizers = quantizers

    def prepare(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Prepare by each."""
        for quantizer in self.quantizers:
            model = quantizer.prepare(model)
        return model

    def convert(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Convert by each."""
        for quantizer in self.quantizers:
            model = quantizer.convert(model)
        return model


def _convert(
    model: torch.nn.Module, kind: type[FakeQuantizedLinear] | type[FakeQuantizedEmbedding], who: str
) -> torch.nn.Module:
    layers = {fqn: module for fqn, module in model.named_modules() if type(module) is kind}
    if not layers:
        raise ValueError(nothing_prepared(model, who))
    swap(model, quantized(model, layers))
    return model
