"""`aotrain::nvfp4_cast` and the operands of `aotrain::nvfp4_mm` on CPU: csrc/cpu/nvfp4_*.cpp, called through ctypes."""

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch

from aotrain.formats import FLOAT4_E2M1, decode_elements, unpack_float4
from aotrain.formats.random import seed_word
from aotrain.kernels._native import native_library

# Enums Isa and Input of csrc/cpu/{isa,cast}.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled cast, None) or (None, why it is not there)."""
    found, reason = native_library("nvfp4_cast")
    if found is not None:
        found.aotrain_nvfp4_cast.restype = None
        found.aotrain_nvfp4_cast.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    return found, reason


@functools.lru_cache(maxsize=1)
def decode_library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled decoder, None) or (None, why it is not there)."""
    found, reason = native_library("nvfp4_mm")
    if found is not None:
        found.aotrain_nvfp4_decode.restype = None
        found.aotrain_nvfp4_decode.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p),
            *(ctypes.c_int, ctypes.c_int),
        )
    return found, reason


def decode_operand(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, isa: str | None = None) -> torch.Tensor:
    """data * scale, exactly, [R, P]; tests choose the `isa`.

    Args:
        data: uint8 [R, P / 2].
        scale: float8_e4m3fn [R, P / 16], not negative.
        dtype: bfloat16 or float32.
        isa: instruction set.
    """
    found, _ = decode_library()
    rows, columns = data.shape[0], 2 * data.shape[1]
    if found is None or data.device.type != "cpu" or not (data.is_contiguous() and scale.is_contiguous()):
        blocks = decode_elements(unpack_float4(data, columns), dtype, FLOAT4_E2M1).unflatten(1, (-1, 16))
        return (blocks * decode_elements(scale, dtype)[..., None]).flatten(1)
    values = data.new_empty((rows, columns), dtype=dtype)
    found.aotrain_nvfp4_decode(
        *(data.data_ptr(), scale.data_ptr(), scale.numel(), dtype == torch.bfloat16, values.data_ptr()),
        *(found.aotrain_nvfp4_mm_isa() if isa is None else ISAS[isa], torch.get_num_threads()),
    )
    return values


def cast_operand(
    x_hp: torch.Tensor,
    block_rows: int,
    signs: Sequence[int],
    seed: int | None,
    operand: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    isa: str | None = None,
) -> None:
    """Write data [R, P / 2], scale [R, P / 16] and global scale of x [R, C], not empty; tests choose the `isa`.

    Args:
        x_hp: the operand, its columns contracted; any strides.
        block_rows: 1 or 16.
        signs: of the transform along the columns; none without one.
        seed: of the noise key, the stream included; None rounds to nearest.
        operand: what to write.
        isa: instruction set.

    Raises:
        RuntimeError: the kernel is not built.
    """
    found, reason = library()
    if found is None:
        raise RuntimeError(f"The C++ kernel of aotrain::nvfp4_cast cannot run: {reason}.")
    across = x_hp.stride(0) == 1 and x_hp.stride(1) != 1
    if bool(signs) and not across:
        x_hp, across = x_hp.t().contiguous().t(), True
    elif not across and x_hp.stride(1) != 1:
        x_hp = x_hp.contiguous()
    data, scale, global_scale = operand
    rows, columns = x_hp.shape
    negative = sum(1 << i for i, sign in enumerate(signs) if sign < 0)
    table = array(
        "q",
        (
            *(x_hp.data_ptr(), data.data_ptr(), scale.data_ptr(), global_scale.data_ptr()),
            *(rows, columns, 2 * data.shape[1], x_hp.stride(1 if across else 0)),
            *(across, _INPUTS[x_hp.dtype], block_rows, bool(signs), negative),
            *(seed is not None, 0 if seed is None else seed_word(seed)),
        ),
    )
    found.aotrain_nvfp4_cast(
        table.buffer_info()[0],
        found.aotrain_nvfp4_cast_isa() if isa is None else ISAS[isa],
        torch.get_num_threads(),
    )
