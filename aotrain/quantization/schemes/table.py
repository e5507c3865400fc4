"""The schemes that have a name: what recipes, job files and exporters call them.

| name | weights | activations |
|---|---|---|
| `int2-g32`, `int3-g32`, `int4-g32`, `int4-g128`, `int8-g32` | symmetric integers in groups | as they are |
| `int8` | symmetric int8 per output channel | symmetric int8 per token |
| `int4-g32-a8`, `int4-g32-a4` | symmetric int4 in groups of 32 | symmetric int8 or int4 per token |
| `8da4w` | symmetric int4 in groups of 32 | asymmetric int8 per token (ExecuTorch) |
| `fp8`, `fp8-weight-only` | e4m3 per output channel | e4m3 per token; as they are |
| `fp8-block` | e4m3 in blocks of 128 x 128 | e4m3 per token and 128 elements |
| `nvfp4`, `mxfp4`, `mxfp8` | 4 or 8 bits with block scales | as they are |
| `q4_0` | the grid of llama.cpp's Q4_0 | as they are |
"""

import difflib
from dataclasses import dataclass, replace

import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    ROWWISE,
    SCALE_FORMATS,
    MappingType,
    Scaling,
    integer_format,
)
from aotrain.quantization.schemes.affine import AffineScheme
from aotrain.quantization.schemes.base import TensorScheme
from aotrain.quantization.schemes.nvfp4 import Nvfp4Scheme
from aotrain.quantization.schemes.q4_0 import Q40Scheme
from aotrain.quantization.schemes.scaled import ScaledScheme


@dataclass(frozen=True, slots=True)
class Scheme:
    """What happens to the weight and to the input of a linear layer.

    Attributes:
        name: as in recipes; "" for one that has none.
        weight: scheme of the weight [out_features, in_features].
        activation: scheme of the input [..., in_features], quantized as it comes; None: left as it is.
    """

    name: str
    weight: TensorScheme
    activation: TensorScheme | None = None

    def problem(self, out_features: int, in_features: int) -> str | None:
        """Why a layer of this size cannot take the scheme; None when it can."""
        problem = self.weight.problem((out_features, in_features))
        if problem is None and self.activation is not None:
            problem = self.activation.problem((1, in_features))
        return problem


def _weights(bits: int, group_size: int | None, *, scale_gradient: bool = False) -> AffineScheme:
    # Gradients of scales win back a good part of a large loss (docs/LOG.md) and cost further passes over the weight.
    return AffineScheme(integer_format(bits, group_size=group_size), scale_gradient=scale_gradient)


def _tokens(bits: int) -> AffineScheme:
    """Symmetric integers per token, in float32 as serving kernels compute them."""
    return AffineScheme(
        replace(integer_format(bits, scale_dtype=torch.float32), compute_dtype=torch.float32, eps=1e-12)
    )


_FP8_ROWS = ScaledScheme(Scaling(element=FLOAT8_E4M3, block=ROWWISE))
_FP8_TILES = ScaledScheme(Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_128X128))
_FP8_TOKEN_BLOCKS = ScaledScheme(Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_1X128))
# Rounding the scale up never saturates; a checkpoint's reader does not depend on it.
_MX_SCALE = SCALE_FORMATS["e8m0_rceil"]

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int2-g32", _weights(2, 32, scale_gradient=True)),
        Scheme("int3-g32", _weights(3, 32, scale_gradient=True)),
        Scheme("int4-g32", _weights(4, 32)),
        Scheme("int4-g128", _weights(4, 128)),
        Scheme("int8-g32", _weights(8, 32)),
        Scheme("int8", _weights(8, None), _tokens(8)),
        Scheme("int4-g32-a8", _weights(4, 32), _tokens(8)),
        Scheme("int4-g32-a4", _weights(4, 32, scale_gradient=True), _tokens(4)),
        Scheme("8da4w", _weights(4, 32), AffineScheme(integer_format(8, mapping=MappingType.ASYMMETRIC))),
        Scheme("fp8", _FP8_ROWS, _FP8_ROWS),
        Scheme("fp8-weight-only", _FP8_ROWS),
        Scheme("fp8-block", _FP8_TILES, _FP8_TOKEN_BLOCKS),
        Scheme("nvfp4", Nvfp4Scheme()),
        Scheme("mxfp4", ScaledScheme(Scaling(element=FLOAT4_E2M1, scale=_MX_SCALE, block=BLOCKWISE_1X32))),
        Scheme("mxfp8", ScaledScheme(Scaling(element=FLOAT8_E4M3, scale=_MX_SCALE, block=BLOCKWISE_1X32))),
        Scheme("q4_0", Q40Scheme()),
    )
}


def get_scheme(scheme: str | Scheme, scale_dtype: torch.dtype | None = None) -> Scheme:
    """The scheme of a name, with the scales of integer weights in the dtype that the server stores.

    Args:
        scheme: a name of `SCHEMES`, or a scheme, which is taken as it is.
        scale_dtype: dtype of the scales of integer weights in the exported checkpoint: usually that of the model when
            it is served. Training in float32 for a bfloat16 server needs it; None: the dtype of the weights.

    Raises:
        ValueError: no scheme has this name.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            close = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"get_scheme got {scheme!r}; {hint}want one of {', '.join(SCHEMES)}.")
        scheme = SCHEMES[scheme]
    if scale_dtype is None or not isinstance(scheme.weight, AffineScheme):
        return scheme
    weight = replace(scheme.weight, format=replace(scheme.weight.format, scale_dtype=scale_dtype))
    return replace(scheme, weight=weight)
