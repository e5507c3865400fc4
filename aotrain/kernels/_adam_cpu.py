"""`aotrain::adam_` on CPU: the C++ kernel of csrc/cpu/adam.cpp, called through ctypes."""

import ctypes
import functools
from collections.abc import Sequence

import torch

from aotrain.kernels._native import native_library

ISA_SCALAR, ISA_AVX512 = 0, 1

# Below this many parameters a thread costs more than it saves.
_MIN_PER_THREAD = 32768


class _Scalars(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_float)
            for name in (
                "one_minus_beta1",
                "one_minus_beta2",
                "eps",
                "decay_factor",
                "coupled_decay",
                "step_size",
                "inv_sqrt_bias_correction2",
            )
        ),
        ("maximize", ctypes.c_int32),
    )


def problem(state_format: str, block_size: int, stochastic: bool) -> str | None:
    """Why the kernel cannot be used; None when it can."""
    found, reason = library()
    if found is None:
        return reason
    if state_format != "dynamic8" or stochastic:
        return f"there is no CPU kernel for {state_format} state{' with stochastic rounding' if stochastic else ''}"
    if block_size > found.aotrain_adam_max_block():
        return f"blocks are limited to {found.aotrain_adam_max_block()} elements"
    return None


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernel, None) or (None, why it is not there)."""
    found, reason = native_library("adam")
    if found is not None:
        pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        found.aotrain_adam.restype = None
        found.aotrain_adam.argtypes = (
            *(pointer, number, pointer, number),  # parameter, gradient
            *(pointer, pointer, pointer, pointer),  # state
            *(count, count, count),
            *(ctypes.POINTER(_Scalars), number, number),
        )
        found.aotrain_adam_max_block.restype = count
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
    isa: int | None = None,
    **scalars: float,
) -> None:
    """The C++ kernel, which splits blocks over torch's number of threads; tests choose its instruction set."""
    reason = problem(state_format, block_size, bool(rounding_keys))
    found, _ = library()
    if reason is not None or found is None:
        raise RuntimeError(f"aotrain::adam_ cannot run: {reason}.")
    c_scalars = _Scalars(**scalars, maximize=maximize)
    lists = (params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
    for param, grad, *state in zip(*lists, strict=True):
        if param.numel() == 0:
            continue
        found.aotrain_adam(
            *(param.data_ptr(), param.dtype == torch.bfloat16, grad.data_ptr(), grad.dtype == torch.bfloat16),
            *(tensor.data_ptr() for tensor in state),
            *(param.shape[0], param.shape[1:].numel(), block_size),
            *(ctypes.byref(c_scalars), found.aotrain_adam_isa() if isa is None else isa),
            max(1, min(torch.get_num_threads(), param.numel() // _MIN_PER_THREAD)),
        )
