"""`aotrain::scaled_cast` on CPU: the C++ kernel of csrc/cpu/scaled_cast.cpp, called through ctypes."""

import ctypes
import functools
from array import array

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, scale_shape
from aotrain.kernels._native import native_library

# Enums Isa, Input, Element and ScaleFormat of csrc/cpu/{isa,cast}.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ELEMENTS = {"float8_e4m3fn": 0, "float8_e5m2": 1, "int8": 2, "float4_e2m1fn": 3}
_SCALES = {"float32": 0, "float32_pow2": 1, "e8m0_floor": 2, "e8m0_ceil": 3, "e8m0_even": 4, "e8m0_rceil": 5}


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernel, None) or (None, why it is not there)."""
    found, reason = native_library("scaled_cast")
    if found is not None:
        found.aotrain_scaled_cast.restype = None
        found.aotrain_scaled_cast.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return found, reason


def problem(x_hp: torch.Tensor, element: str, scale: str) -> str | None:
    """Why the kernel cannot cast this tensor; None when it can."""
    found, reason = library()
    if found is None:
        return reason
    if x_hp.dtype not in _INPUTS or element not in _ELEMENTS or scale not in _SCALES:
        return f"there is no kernel for {x_hp.dtype} to {element} with {scale} scales"
    if element == "int8" and scale.startswith("e8m0"):
        return "there is no kernel for int8 with E8M0 scales"
    if x_hp.dim() < 2 or x_hp.numel() == 0 or x_hp.layout != torch.strided:
        return "the tensor is empty, sparse or not a matrix"
    return None


def scaled_cast(
    x_hp: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int, isa: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast a tensor without `problem` on torch's number of threads; tests choose the instruction set."""
    found, reason = library()
    if found is None:
        raise RuntimeError(f"The C++ kernel of aotrain::scaled_cast cannot run: {reason}.")
    codes = x_hp.new_empty(x_hp.shape, dtype=ELEMENT_FORMATS[element].dtype)
    scales = x_hp.new_empty(scale_shape(x_hp.shape, (block_rows, block_columns)), dtype=SCALE_FORMATS[scale].dtype)
    x, transposed = _batch_of_matrices(x_hp, block_rows)
    batch, rows, columns = x.shape
    blocks = (block_columns, block_rows) if transposed else (block_rows, block_columns)
    table = array(
        "q",
        (
            *(x.data_ptr(), codes.data_ptr(), scales.data_ptr()),
            *(batch, rows, columns, x.stride(0), x.stride(1)),
            *(dim if size == -1 or size > dim else size for dim, size in zip((rows, columns), blocks, strict=True)),
            *(transposed, _INPUTS[x.dtype], _ELEMENTS[element], _SCALES[scale]),
        ),
    )
    found.aotrain_scaled_cast(
        table.buffer_info()[0],
        found.aotrain_scaled_cast_isa() if isa is None else ISAS[isa],
        torch.get_num_threads(),
    )
    return codes, scales


def _batch_of_matrices(x: torch.Tensor, block_rows: int) -> tuple[torch.Tensor, bool]:
    """(a view [batch, rows, columns] of x, or of its transpose, whose columns are adjacent; whether transposed).

    Copies only what has no such view.
    """
    if x.dim() > 2 and block_rows == 1 and x.is_contiguous():
        x = x.flatten(0, -2)  # one large matrix: no block has more than a row
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x, False
    if x.stride(-2) == 1 or x.shape[-2] == 1:
        return x.transpose(-1, -2), True
    return x.contiguous(), False
