"""Every Triton kernel at every configuration it ships with, as data for ahead-of-time compilation.

A new kernel adds one function to `KERNELS`. `scripts/compile_kernels.py` compiles the list for each GPU architecture on
machines without a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aotrain.formats import FLOAT8_E4M3, FLOAT8_E5M2, SCALE_FORMATS
from aotrain.kernels.adam import AdamScalars
from aotrain.kernels.triton import _adam_launch, scaled_cast
from aotrain.kernels.triton._adam_launch import FLOAT32_BLOCK, Class
from aotrain.kernels.triton.adam import adam_kernel

_POINTER_OF_ELEMENT = {"float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5"}


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelVariant:
    """One specialization of a kernel.

    Attributes:
        name: kernel name without the leading underscore and the trailing `_kernel`.
        variant: what distinguishes it from the other specializations.
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type, "constexpr" for compile-time constants.
        constants: compile-time constants by name.
        aligned: arguments that are multiples of 16, as the launcher finds them for contiguous tensors.
        num_warps: warps per program.
        options: further compiler options.
    """

    name: str
    variant: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})


def scaled_cast_rowwise() -> Iterator[KernelVariant]:
    """All tiles for the training recipe's format from bfloat16; the other formats and dtypes at one tile each."""
    rows = [(config, True) for config in scaled_cast.ROW_MAJOR_CONFIGS] + [(scaled_cast.LONG_ROW_CONFIG, False)]
    for config, row_fits in rows:
        yield _rowwise("bf16", "float8_e4m3fn", "float32_pow2", config, row_fits, row_major=True)
    for row_fits in (True, False):
        yield _rowwise(
            "bf16", "float8_e4m3fn", "float32_pow2", scaled_cast.COLUMN_MAJOR_CONFIG, row_fits, row_major=False
        )
    middle = scaled_cast.ROW_MAJOR_CONFIGS[len(scaled_cast.ROW_MAJOR_CONFIGS) // 2]
    for dtype in ("bf16", "fp16", "fp32"):
        for element in _POINTER_OF_ELEMENT:
            yield _rowwise(dtype, element, "float32", middle, True, row_major=True)


def adam() -> Iterator[KernelVariant]:
    """Every state format on its fastest path, and for 8-bit state all roundings, dtypes and paths."""
    whole = Class(FLAT=True, WHOLE=True, ALIGNED=True, ROUNDING="nearest")
    ragged = Class(FLAT=False, WHOLE=False, ALIGNED=True, ROUNDING="nearest")
    for state, block_size in (("dynamic8", 256), ("dynamic4", 128), ("float8_e4m3fn", 256), ("float32", FLOAT32_BLOCK)):
        yield _adam("bf16", state, block_size, whole)
    yield _adam("fp32", "dynamic8", 256, whole)
    yield _adam("bf16", "dynamic8", 256, whole._replace(ROUNDING="stochastic8"))
    yield _adam("bf16", "dynamic8", 256, ragged)
    yield _adam("bf16", "dynamic4", 128, ragged._replace(ALIGNED=False))
    yield _adam("bf16", "dynamic8", 256, ragged._replace(ALIGNED=False, ROUNDING="stochastic"))


KERNELS: tuple[Callable[[], Iterator[KernelVariant]], ...] = (scaled_cast_rowwise, adam)


def _adam(dtype: str, state: str, block_size: int, shared: Class) -> KernelVariant:
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    constants = _adam_launch.kernel_constants(torch_dtype, torch_dtype, state, block_size, shared)
    constants |= {"MAXIMIZE": False, "COUPLED": False}
    pointers = {"table_ptr": "*i64", "tile_ptr": "*i32", "key_ptr": "*i64", "maps_ptr": "*i32"}
    scalars = dict.fromkeys(AdamScalars._fields, "fp32")
    path = "whole" if shared.WHOLE else "ragged" if shared.ALIGNED else "unaligned"
    return KernelVariant(
        name="adam",
        variant=f"{dtype}-{state}-{block_size}-{path}-{shared.ROUNDING}",
        kernel=adam_kernel,
        signature=pointers | scalars | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=tuple(pointers),
        num_warps=_adam_launch.NUM_WARPS,
    )


def _rowwise(
    dtype: str, element: str, scale: str, config: scaled_cast.Config, row_fits: bool, row_major: bool
) -> KernelVariant:
    constants = {
        **scaled_cast.kernel_constants(
            {"float8_e4m3fn": FLOAT8_E4M3, "float8_e5m2": FLOAT8_E5M2}[element], SCALE_FORMATS[scale]
        ),
        "ROW_FITS_TILE": row_fits,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
    pointers = {"x_ptr": f"*{dtype}", "data_ptr": _POINTER_OF_ELEMENT[element], "scale_ptr": "*fp32"}
    sizes = dict.fromkeys(("M", "K", "stride_m", "stride_k"), "i32")
    # The launcher turns a stride of 1 into a constant, which is what makes the loads of a row vectors.
    unit_stride = "stride_k" if row_major else "stride_m"
    constants[unit_stride] = 1
    del sizes[unit_stride]
    layout = "rows" if row_major else "columns"
    return KernelVariant(
        name="scaled_cast_rowwise",
        variant=f"{dtype}-{element}-{scale}-{layout}-{config.block_m}x{config.block_k}-{1 if row_fits else 2}pass",
        kernel=scaled_cast._scaled_cast_rowwise_kernel,
        signature=pointers | sizes | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        aligned=(*pointers, *sizes),
        num_warps=config.num_warps,
    )
