"""What an export format is: how an encoded weight is stored, how it is read back, and what the configuration says."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aotrain.export.parts import Rows
from aotrain.quantization.schemes import Encoded, Scheme

# A stored tensor by name.
Reader = Callable[[str], Rows]


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, or an embedding, that is exported quantized.

    Attributes:
        name: of the module; its weight's key is `name.weight`.
        shape: (out_features, in_features), or (num_embeddings, embedding_dim).
        dtype: of the model when it is served: what weights decode to.
        embedding: whether it is one.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    embedding: bool = False

    @property
    def key(self) -> str:
        """Key of the weight in the source."""
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is written.

    Attributes:
        scheme: with scales in the dtype in which they are stored.
        layers: the quantized layers by key of their weight.
        ignored: names of linear layers that stay as they are, the tied output layer among them.
        keys: of all tensors of the source.
    """

    scheme: Scheme
    layers: Mapping[str, Layer]
    ignored: tuple[str, ...]
    keys: tuple[str, ...]


class ExportFormat(ABC):
    """A file layout. Stateless; one instance per format, in `aotrain.export.table`."""

    # As the command names it.
    name: str

    @abstractmethod
    def refusal(self, scheme: Scheme) -> str | None:
        """Why the format cannot carry a scheme, with the remedy; None when it can."""

    def refusal_of_embeddings(self, scheme: Scheme) -> str | None:
        """Why the format's readers take no quantized embeddings; None when they do."""
        return "its readers keep embeddings dense"

    @abstractmethod
    def server_view(self, scheme: Scheme) -> str:
        """What readers call the scheme, and which of their classes takes it; of a scheme that the format carries."""

    def refusal_of_plan(self, plan: Plan) -> str | None:
        """Why the format's readers would get this checkpoint wrong; None when they do not."""
        return None

    def served_dtype(self, source: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
        """Dtype of the exported model, from that of the source and the one asked for.

        Raises:
            ValueError: a dtype that cannot hold the format's values.
        """
        return dtype or source

    @abstractmethod
    def pack(self, layer: Layer, scheme: Scheme, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Rows of stored tensors by key, from the codes of some rows of the weight.

        Each has one entry per row, or one per 128 rows where scales do.
        """

    def constants(self, layer: Layer, scheme: Scheme, global_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Stored tensors by key that a layer has once, whatever its rows."""
        return {}

    @abstractmethod
    def decode(self, layer: Layer, scheme: Scheme, read: Reader, part: slice) -> torch.Tensor:
        """Rows of the weight in `layer.dtype` from stored tensors, by code that shares nothing with `pack`."""

    @abstractmethod
    def update_config(self, config: dict[str, Any], plan: Plan) -> None:
        """Describe the quantization in the contents of config.json, in place."""

    def metadata(self, plan: Plan) -> dict[str, str]:
        """Strings for the header of every file."""
        return {"format": "pt"}
