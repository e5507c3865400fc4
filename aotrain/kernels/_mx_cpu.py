"""What training adds to the MX cast to e2m1, on CPU: csrc/cpu/mx_operand.cpp, called through ctypes."""

import ctypes
import functools

import torch

from aotrain.formats import BLOCKWISE_1X32, Scaling, data_key, scale_shape
from aotrain.formats import hadamard_transform as hadamard_transform_reference
from aotrain.formats.e8m0 import E8M0_ROUNDINGS
from aotrain.kernels._native import native_library


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernels, None) or (None, why they are not there)."""
    found, reason = native_library("mx_operand")
    if found is not None:
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        found.aotrain_hadamard.restype = None
        found.aotrain_hadamard.argtypes = (pointer, pointer, size, size, ctypes.c_int)
        found.aotrain_mx_stochastic.restype = None
        found.aotrain_mx_stochastic.argtypes = (
            *(pointer, size, size, ctypes.c_uint64, ctypes.c_int, pointer, pointer, ctypes.c_int),
        )
    return found, reason


def hadamard_transform(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """`aotrain.formats.hadamard_transform`, bit for bit, of [..., columns]."""
    found, _ = library()
    if found is None or x.numel() == 0:
        return hadamard_transform_reference(x, signs)
    size = signs.numel()
    columns = -(-x.shape[-1] // size) * size
    y = x.new_zeros((*x.shape[:-1], columns), dtype=torch.float32)
    y[..., : x.shape[-1]] = x.contiguous()  # a transposition is faster in 16 bits than while it is widened
    found.aotrain_hadamard(y.data_ptr(), signs.data_ptr(), y.numel() // size, size, torch.get_num_threads())
    return y


def stochastic_problem(x_hp: torch.Tensor, element: str) -> str | None:
    """Why the kernel cannot round this operand; None when it can."""
    found, reason = library()
    if found is None:
        return reason
    if element != "float4_e2m1fn" or x_hp.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there is no kernel for stochastic rounding of {x_hp.dtype} to {element}"
    return "the operand is empty" if x_hp.dim() < 2 or x_hp.numel() == 0 else None


def mx_stochastic(
    x_hp: torch.Tensor, signs: torch.Tensor | None, scaling: Scaling
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of an operand without `stochastic_problem`, transformed first where there are signs."""
    found, reason = library()
    if found is None:
        raise RuntimeError(f"The C++ kernel of aotrain::mx_cast cannot run: {reason}.")
    assert scaling.scale.e8m0_rounding is not None
    key = int(data_key(scaling.hadamard, x_hp)) % 2**64
    x = x_hp.float().contiguous() if signs is None else hadamard_transform(x_hp, signs)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    scale = x.new_empty(scale_shape(x.shape, BLOCKWISE_1X32), dtype=torch.uint8)
    found.aotrain_mx_stochastic(
        *(x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], key),
        *(E8M0_ROUNDINGS.index(scaling.scale.e8m0_rounding), codes.data_ptr(), scale.data_ptr()),
        torch.get_num_threads(),
    )
    return codes, scale.view(torch.float8_e8m0fnu)
