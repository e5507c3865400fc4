"""Schemes: how a tensor is quantized, as one object that trains, converts and exports it."""

from aotrain.quantization.schemes.affine import AffineScheme
from aotrain.quantization.schemes.base import Encoded, TensorScheme
from aotrain.quantization.schemes.flat import FlatScheme
from aotrain.quantization.schemes.int4_float8 import Int4Float8Scheme
from aotrain.quantization.schemes.nvfp4 import Nvfp4Scheme
from aotrain.quantization.schemes.q4_0 import Q40Scheme
from aotrain.quantization.schemes.scaled import ScaledScheme
from aotrain.quantization.schemes.table import SCHEMES, Scheme, get_scheme

__all__ = [
    "SCHEMES",
    "AffineScheme",
    "Encoded",
    "FlatScheme",
    "Int4Float8Scheme",
    "Nvfp4Scheme",
    "Q40Scheme",
    "ScaledScheme",
    "Scheme",
    "TensorScheme",
    "get_scheme",
]
