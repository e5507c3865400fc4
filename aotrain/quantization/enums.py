"""Enumerations of the base configurations: the members' names are what checkpoints on the Hugging Face hub store.

Packing formats name layouts of somebody's kernels. Modules of this library hold codes in one layout of their own
(`quantization.modules`), so a format matters only where the numbers differ; what `scheme_of` cannot give, it refuses.
"""

from enum import Enum


class Int4PackingFormat(str, Enum):  # noqa: UP042  StrEnums print otherwise than the ones users know
    """Layouts of int4 weights. PLAIN and PRESHUFFLED have the same numbers."""

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    PLAIN_INT32 = "plain_int32"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"


class Int4ChooseQParamsAlgorithm(str, Enum):  # noqa: UP042
    """How scales and zero points of int4 weights are chosen: from the bounds of a group, or by HQQ's iteration."""

    TINYGEMM = "tinygemm"
    HQQ = "hqq"


class IntxPackingFormat(str, Enum):  # noqa: UP042
    """Layouts of int1 to int8 weights; those called opaque belong to Arm kernels."""

    UNPACKED_TO_INT8 = "unpacked_to_int8"
    OPAQUE_ATEN_KLEIDIAI = "opaque_aten_kleidiai"
    OPAQUE_TORCHAO_AUTO = "opaque_torchao_auto"
    OPAQUE_TORCHAO_KLEIDIAI = "opaque_torchao_kleidiai"
    OPAQUE_TORCHAO_LOWBIT = "opaque_torchao_lowbit"


class IntxChooseQParamsAlgorithm(str, Enum):  # noqa: UP042
    """How scales of integer weights are chosen: from the bounds of a group, or by HQQ's iteration."""

    AFFINE = "affine"
    HQQ_SCALE_ONLY = "hqq_scale_only"


class Float8PackingFormat(str, Enum):  # noqa: UP042
    """Layouts of float8 weights; the sparse ones are of 2:4 sparse weights."""

    PLAIN = "plain"
    SPARSE_2D_DATA_2D_METADATA = "sparse_2d_data_2d_metadata"
    SPARSE_CUTLASS = SPARSE_2D_DATA_2D_METADATA
    SPARSE_1D_DATA_1D_METADATA = "sparse_1d_data_1d_metadata"
