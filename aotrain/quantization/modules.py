"""Layers with quantized weights: codes and scales in plain buffers, on every device.

`QuantizedLinear` and `QuantizedEmbedding` hold what a scheme encoded, and nothing else: no tensor subclass, so that a
state dict is plain tensors that safetensors writes, `weights_only` loads and every collective moves.

| buffer | what it is |
|---|---|
| `codes` | int8, or uint8: float8 bits, or codes of 1, 2 and up to 4 bits in bytes, the first in the lowest bits |
| `scale` | as the scheme made it; e8m0 and e4m3 scales as uint8 |
| `zero_point` | int8 or uint8 codes, or values; only where the scheme has one |
| `global_scale` | float32; only where the scheme has one |

Integers are stored as their distance from the smallest code where they are packed. `weight` is the dequantized weight,
made when it is asked for, in the dtype that the layer was built in: bit for bit what a fake quantizer with the same
scheme made of the original weight. Moving a layer moves its buffers and changes the dtype of none of them;
`layer.to(dtype)` changes `weight`, which is then decoded in that dtype, and the bias.

Forward multiplies by that weight, after it has quantized the input as the scheme says: the result is that of training,
bit for bit. `quantization.products.fast_products(model)` lets layers call torch's own products of codes instead, which
are faster and round otherwise.
"""

from collections.abc import Callable
from typing import Self

import torch

from aotrain.formats import pack_codes, unpack_codes
from aotrain.ops.fake_quantize import fake_quantize
from aotrain.quantization.products import find_product
from aotrain.quantization.schemes import Encoded, Scheme

_BUFFERS = ("codes", "scale", "zero_point", "global_scale")


class QuantizedModule(torch.nn.Module):
    """A layer whose weight is codes and scales.

    Attributes:
        scheme: how the weight is encoded, and the input where the scheme says so.
        dtype: in which the weight is decoded.
    """

    scheme: Scheme
    dtype: torch.dtype
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    global_scale: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scheme: Scheme, **given: torch.Tensor | None) -> None:
        super().__init__()
        self.scheme, self.dtype, self._columns = scheme, weight.dtype, weight.shape[-1]
        encoded = scheme.weight.encode(weight.detach(), **given)
        self._data_dtype, self._scale_dtype = encoded.data.dtype, encoded.scale.dtype
        smallest, largest = scheme.weight.code_range
        self._bits = next(bits for bits in (1, 2, 4, 8) if largest - smallest < 2**bits)
        self._smallest = smallest if self._bits < 8 else 0
        for name, buffer in zip(_BUFFERS, self._stored(encoded), strict=True):
            self.register_buffer(name, buffer)

    def _stored(self, encoded: Encoded) -> tuple[torch.Tensor | None, ...]:
        data, scale, zero_point, global_scale = (None if part is None else part.detach() for part in encoded)
        assert data is not None
        assert scale is not None
        if self._bits < 8:
            data = pack_codes((data - self._smallest).to(torch.uint8), self._bits)
        elif data.dtype.is_floating_point:
            data = data.view(torch.uint8)
        if zero_point is not None and not zero_point.is_floating_point():
            zero_point = zero_point.to(self._data_dtype)
        # Contiguous copies: of a given scale that goes on being trained, too.
        parts = (data, _as_bytes(scale), zero_point, global_scale)
        return tuple(None if part is None else part.clone(memory_format=torch.contiguous_format) for part in parts)

    def encoded(self) -> Encoded:
        """Codes, one element each, and scales, as the scheme made them."""
        return self._encoded(self.codes, self.scale, self.zero_point)

    def _encoded(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> Encoded:
        if self._bits < 8:
            codes = unpack_codes(codes, self._bits, self._columns)
            if self._smallest:
                codes = codes.to(self._data_dtype) + self._smallest
        if zero_point is not None and not zero_point.is_floating_point():
            zero_point = zero_point.to(torch.int32)
        return Encoded(codes.view(self._data_dtype), scale.view(self._scale_dtype), zero_point, self.global_scale)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, in `dtype`, without gradient."""
        with torch.no_grad():
            return self.scheme.weight.decode(self.encoded(), self.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but keep their dtypes: rounding a scale would change what was trained."""
        kept = {name: buffer for name in _BUFFERS if (buffer := self._buffers[name]) is not None}
        for name in kept:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
        for name, buffer in kept.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept["codes"].device)).dtype
        return self

    def _describe_scheme(self) -> str:
        named = self.scheme.name or f"weight={self.scheme.weight}, activation={self.scheme.activation}"
        return f"scheme={named}, dtype={self.dtype}"


class QuantizedLinear(QuantizedModule):
    """`fq(x)[..., K] @ weight[N, K].T + bias` with quantized weights.

    Attributes:
        fast: whether forward may call a product of codes; see `quantization.products`.
    """

    fast: bool = False

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scheme: Scheme,
        *,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        """Quantize a weight.

        Args:
            weight: [N, K] float32, bfloat16 or float16; a plain tensor on any device, meta included.
            bias: [N], or None. A parameter is kept as it is.
            scheme: how to quantize.
            scale: scales to use instead of those of the weight's own blocks, such as learned ones.
            zero_point: goes with `scale`.
            global_scale: upper level of scales to use, such as that of a group of layers.

        Raises:
            ValueError: a weight that the scheme cannot take, or one that is not a plain matrix.
        """
        _check_weight(weight, scheme)
        super().__init__(weight, scheme, scale=scale, zero_point=zero_point, global_scale=global_scale)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", _as_parameter(bias))

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, scheme: Scheme, **given: torch.Tensor | None) -> Self:
        """A quantized layer in place of a linear layer, whose bias it shares; `given` as for the constructor."""
        return cls(linear.weight, linear.bias, scheme, **given).train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        bias = None if self.bias is None else self.bias.to(dtype)
        product = find_product(self, x, dtype) if self.fast else None
        if product is not None:
            return product(self, x.to(dtype), bias)
        activation = self.scheme.activation
        x = x if activation is None else fake_quantize(x, activation)
        return torch.nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._describe_scheme()}"
        )


class QuantizedEmbedding(QuantizedModule):
    """Rows of a quantized table."""

    def __init__(
        self,
        weight: torch.Tensor,
        scheme: Scheme,
        *,
        padding_idx: int | None = None,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        """Quantize a table.

        Args:
            weight: [num_embeddings, embedding_dim]; see `QuantizedLinear`.
            scheme: how to quantize; without activations, which an embedding has none of.
            padding_idx: as in `torch.nn.Embedding`; has no effect on the result.
            scale: as for `QuantizedLinear`; also the two below.
            zero_point: likewise.
            global_scale: likewise.

        Raises:
            ValueError: a scheme with activations, or see `QuantizedLinear`.
        """
        _check_weight(weight, scheme)
        if scheme.activation is not None:
            raise ValueError(
                f"QuantizedEmbedding got a scheme with activations, {scheme.activation}; want one of weights only, "
                "such as that of IntxWeightOnlyConfig."
            )
        super().__init__(weight, scheme, scale=scale, zero_point=zero_point, global_scale=global_scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: torch.nn.Embedding, scheme: Scheme, **given: torch.Tensor | None) -> Self:
        """A quantized table in place of an embedding; `given` as for the constructor.

        Raises:
            ValueError: an embedding with `max_norm`, which changes its rows when they are read.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"QuantizedEmbedding got max_norm={embedding.max_norm}; want None: its table is constant.")
        quantized = cls(embedding.weight, scheme, padding_idx=embedding.padding_idx, **given)
        return quantized.train(embedding.training)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        rows = self.codes.shape[0]
        if self.scale.dim() != 2 or self.scale.shape[0] != rows:
            return torch.nn.functional.embedding(indices, self.weight)
        # Each row has scales of its own: decode those that are asked for.
        flat = indices.flatten()
        codes, scale = self.codes[flat], self.scale[flat]
        zero_point = None if self.zero_point is None else self.zero_point[flat]
        values = self.scheme.weight.decode(self._encoded(codes, scale, zero_point), self.dtype)
        return values.reshape(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe_scheme()}"


def _check_weight(weight: torch.Tensor, scheme: Scheme) -> None:
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dim() != 2:
        raise ValueError(
            f"Quantizing got a weight of type {type(weight).__name__} and shape {tuple(weight.shape)}; want a plain "
            "matrix: quantize before the model is sharded or wrapped, or gather its weights first."
        )
    problem = scheme.problem(*weight.shape)
    if problem is not None:
        raise ValueError(f"Quantizing got a weight that {scheme.name or 'the scheme'} cannot take: {problem}.")


def _as_parameter(bias: torch.Tensor | None) -> torch.nn.Parameter | None:
    return bias if bias is None or isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias, False)


def _as_bytes(scale: torch.Tensor) -> torch.Tensor:
    """float8 scales as uint8: `.to(dtype)`, and collectives, know nothing of their dtypes."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale
