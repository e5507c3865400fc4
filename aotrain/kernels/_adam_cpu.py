"""`aotrain::adam_` on CPU: the C++ kernel of csrc/cpu/adam.cpp, called through ctypes."""

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch

from aotrain.kernels._native import native_library

# Enums Isa and Format of csrc/cpu/adam.h.
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
_FORMATS = {"dynamic8": 0, "dynamic4": 1, "float8_e4m3fn": 2, "float32": 3}
_SCALARS = (
    "one_minus_beta1",
    "one_minus_beta2",
    "eps",
    "decay_factor",
    "coupled_decay",
    "step_size",
    "inv_sqrt_bias_correction2",
)
_FLAGS = ("maximize", "format", "param_bf16", "grad_bf16", "stochastic")


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in _SCALARS),
        *((name, ctypes.c_int32) for name in _FLAGS),
        ("block_size", ctypes.c_int64),
    )


def problem(state_format: str, block_size: int) -> str | None:
    """Why the kernel cannot be used; None when it can."""
    found, reason = library()
    if found is None:
        return reason
    if state_format != "float32" and block_size > found.aotrain_adam_max_block():
        return f"blocks are limited to {found.aotrain_adam_max_block()} elements"
    return None


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernel, None) or (None, why it is not there)."""
    found, reason = native_library("adam")
    if found is not None:
        found.aotrain_adam.restype = None
        found.aotrain_adam.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Options)),
            *(ctypes.c_int, ctypes.c_int),
        )
        found.aotrain_adam_max_block.restype = ctypes.c_int64
    return found, reason


def adam_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_sq_scales: Sequence[torch.Tensor],
    *,
    state_format: str,
    block_size: int,
    maximize: bool = False,
    rounding_keys: Sequence[int] = (),
    first_indices: Sequence[int] = (),
    row_strides: Sequence[int] = (),
    isa: str | None = None,
    **scalars: float,
) -> None:
    """Step all parameters on torch's number of threads; tests choose the instruction set."""
    reason = problem(state_format, block_size)
    found, _ = library()
    if reason is not None or found is None:
        raise RuntimeError(f"aotrain::adam_ cannot run: {reason}.")
    if not params:
        return
    options = _Options(
        **scalars,
        maximize=maximize,
        format=_FORMATS[state_format],
        param_bf16=params[0].dtype == torch.bfloat16,
        grad_bf16=grads[0].dtype == torch.bfloat16,
        stochastic=bool(rounding_keys),
        block_size=block_size,
    )
    quantized = state_format != "float32"
    rounding = zip(rounding_keys, first_indices, row_strides, strict=True) if rounding_keys else None
    table = array("q")
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row_length = param.shape[1:].numel()
        key, first, stride = next(rounding) if rounding else (0, 0, 0)
        # Without blocks, and where the rows follow each other, all of it is one row.
        merged = not quantized and (rounding is None or stride == row_length)
        table.extend(
            (
                *(param.data_ptr(), grad.data_ptr()),
                *(exp_avgs[index].data_ptr(), exp_avg_scales[index].data_ptr() if quantized else 0),
                *(exp_avg_sqs[index].data_ptr(), exp_avg_sq_scales[index].data_ptr() if quantized else 0),
                *((1, param.numel()) if merged else (param.shape[0], row_length)),
                *(key, first, stride),
            )
        )
    found.aotrain_adam(
        *(table.buffer_info()[0], len(params), ctypes.byref(options)),
        *(found.aotrain_adam_isa() if isa is None else ISAS[isa], torch.get_num_threads()),
    )
