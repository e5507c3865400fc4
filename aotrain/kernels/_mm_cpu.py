"""The emulated `aotrain::scaled_mm` on CPU but for its matrix product: csrc/cpu/scaled_mm.cpp, called through ctypes.

Every function falls back to plain torch where the library is not built or a tensor is not what it takes.
"""

import ctypes
import functools
from array import array

import torch

from aotrain.formats import ElementFormat
from aotrain.formats import decode_elements as decode_elements_reference
from aotrain.formats.scaling import Block, expand_blocks
from aotrain.kernels._native import native_library

# Enum Isa of csrc/cpu/isa.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernels, None) or (None, why they are not there)."""
    found, reason = native_library("scaled_mm")
    if found is not None:
        found.aotrain_decode.restype = None
        found.aotrain_decode.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
            *(ctypes.c_int, ctypes.c_int),
        )
        found.aotrain_scale_blocks.restype = None
        found.aotrain_scale_blocks.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        found.aotrain_scale_product.restype = None
        found.aotrain_scale_product.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return found, reason


def decode_elements(
    data: torch.Tensor, dtype: torch.dtype, isa: str | None = None, *, element: ElementFormat | None = None
) -> torch.Tensor:
    """`aotrain.formats.decode_elements`: data as bfloat16 or float32, exactly; tests choose the `isa`."""
    found, _ = library()
    if found is None or data.device.type != "cpu" or not data.is_contiguous():
        return decode_elements_reference(data, dtype, element)
    table = _values_of_codes(data.dtype, dtype, element)
    values = data.new_empty(data.shape, dtype=dtype)
    found.aotrain_decode(
        *(data.data_ptr(), data.numel(), table.data_ptr(), table.element_size(), values.data_ptr()),
        *(found.aotrain_scaled_mm_isa() if isa is None else ISAS[isa], torch.get_num_threads()),
    )
    return values


def dequantize_blocks(
    data: torch.Tensor,
    scale: torch.Tensor,
    block: Block,
    dtype: torch.dtype,
    isa: str | None = None,
    *,
    element: ElementFormat | None = None,
) -> torch.Tensor:
    """`decode_elements(data, dtype) * expand_blocks(scale)`, each product rounded once to dtype.

    Args:
        data: [R, C] float8 or int8, or codes.
        scale: [ceil(R / block[0]), ceil(C / block[1])] float32.
        block: sizes >= 1.
        dtype: bfloat16 or float32.
        isa: for tests.
        element: format of the data; needed for codes.
    """
    values = decode_elements(data, dtype, isa, element=element)
    found, _ = library()
    if found is None or values.device.type != "cpu" or not scale.is_contiguous() or values.numel() == 0:
        return (values.float() * expand_blocks(scale, data.shape, block)).to(dtype)
    table = array("q", (values.data_ptr(), scale.data_ptr(), *values.shape, *block, dtype == torch.bfloat16))
    found.aotrain_scale_blocks(
        table.buffer_info()[0],
        found.aotrain_scaled_mm_isa() if isa is None else ISAS[isa],
        torch.get_num_threads(),
    )
    return values


def scale_product(
    product: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    isa: str | None = None,
) -> torch.Tensor:
    """`(product.float() * a_scale * b_scale.t()).to(out_dtype)`, in place where the dtype stays.

    A NaN in a bfloat16 result is 0x7fc0; torch writes whichever NaN its vector code makes.

    Args:
        product: [M, N], consumed; int32, or a floating dtype.
        a_scale: [M, 1] or [1, 1].
        b_scale: [N, 1] or [1, 1].
        out_dtype: of the result.
        isa: for tests.
    """
    found, _ = library()
    scales = (a_scale, b_scale)
    sums = product.dtype == torch.int32
    if (
        found is None
        or product.device.type != "cpu"
        or (product.dtype != out_dtype and not sums)
        or out_dtype not in (torch.bfloat16, torch.float32)
        or not product.is_contiguous()
        or not all(_is_scale_of(size, scale) for size, scale in zip(product.shape, scales, strict=True))
    ):
        return (product.float() * a_scale * b_scale.t()).to(out_dtype)
    values = product.new_empty(product.shape, dtype=out_dtype) if sums else product
    table = array(
        "q",
        (
            *(values.data_ptr(), product.data_ptr() if sums else 0, a_scale.data_ptr(), b_scale.data_ptr()),
            *product.shape,
            *(int(scale.numel() > 1) for scale in scales),
            out_dtype == torch.bfloat16,
        ),
    )
    found.aotrain_scale_product(
        table.buffer_info()[0],
        found.aotrain_scaled_mm_isa() if isa is None else ISAS[isa],
        torch.get_num_threads(),
    )
    return values


@functools.lru_cache(maxsize=16)
def _values_of_codes(element_dtype: torch.dtype, dtype: torch.dtype, element: ElementFormat | None) -> torch.Tensor:
    bytes_ = torch.arange(256, dtype=torch.uint8, device="cpu")
    if element is not None and element.stored_as_codes:
        return decode_elements_reference(bytes_, dtype, element)
    return bytes_.view(element_dtype).to(dtype)


def _is_scale_of(size: int, scale: torch.Tensor) -> bool:
    return scale.dtype == torch.float32 and scale.is_contiguous() and tuple(scale.shape) in ((1, 1), (size, 1))
