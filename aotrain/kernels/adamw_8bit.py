"""One Adam(W) step with 8-bit dynamic state, fused: the bits of `aotrain.optim.step` with 8-bit `aotrain.optim.state`.

`aotrain::adamw_8bit_` mutates parameter, codes and scales. On CPU it is the C++ kernel of csrc/cpu/adamw_8bit.cpp,
which splits blocks over torch's number of threads; there is no other implementation, so ask
`adamw_8bit_problem` or use `adamw_8bit_step`, which says whether it did the step.
"""

import ctypes
import functools

import torch

from aotrain.kernels._library import LIBRARY
from aotrain.kernels._native import native_library

LIBRARY.define(
    "adamw_8bit_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg_codes, Tensor(c!) exp_avg_scale,"
    " Tensor(d!) exp_avg_sq_codes, Tensor(e!) exp_avg_sq_scale, *, float one_minus_beta1, float one_minus_beta2,"
    " float eps, float decay_factor, float coupled_decay, float step_size, float inv_sqrt_bias_correction2,"
    " int block_size, bool maximize=False) -> ()"
)

ISA_SCALAR, ISA_AVX512 = 0, 1

_DTYPES = (torch.float32, torch.bfloat16)
# Below this many parameters a thread costs more than it saves.
_MIN_PER_THREAD = 32768


class _Scalars(ctypes.Structure):
    _fields_ = (
        ("one_minus_beta1", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("decay_factor", ctypes.c_float),
        ("coupled_decay", ctypes.c_float),
        ("step_size", ctypes.c_float),
        ("inv_sqrt_bias_correction2", ctypes.c_float),
        ("maximize", ctypes.c_int32),
    )


def adamw_8bit_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
    decay_factor: float,
    coupled_decay: float,
    step_size: float,
    inv_sqrt_bias_correction2: float,
    block_size: int,
    maximize: bool = False,
) -> bool:
    """Update parameter and state in place if a kernel can; otherwise touch nothing and return False.

    Args:
        param: float32 or bfloat16, at least one dimension; rows are what follows dimension 0.
        grad: float32 or bfloat16, of the same shape.
        exp_avg_codes, exp_avg_sq_codes: uint8, of the same shape.
        exp_avg_scale, exp_avg_sq_scale: float32 [rows, ceil(row length / block_size)].
        one_minus_beta1: this and the other scalars as in `aotrain.optim.step.AdamScalars`.
        block_size: elements per scale along a row.
        maximize: negate the gradient.
    """
    tensors = (param, grad, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    if adamw_8bit_problem(*tensors, block_size=block_size) is not None:
        return False
    torch.ops.aotrain.adamw_8bit_(
        *tensors,
        one_minus_beta1=one_minus_beta1,
        one_minus_beta2=one_minus_beta2,
        eps=eps,
        decay_factor=decay_factor,
        coupled_decay=coupled_decay,
        step_size=step_size,
        inv_sqrt_bias_correction2=inv_sqrt_bias_correction2,
        block_size=block_size,
        maximize=maximize,
    )
    return True


def adamw_8bit_problem(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    *,
    block_size: int,
) -> str | None:
    """Why the kernel cannot take these tensors; None when it can."""
    tensors = (param, grad, exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    if any(tensor.device.type != "cpu" or tensor.layout != torch.strided for tensor in tensors):
        return "there is only a CPU kernel for dense tensors"
    if param.dtype not in _DTYPES or grad.dtype not in _DTYPES:
        return f"there is no kernel for {param.dtype} parameters with {grad.dtype} gradients"
    if param.ndim < 1 or not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    blocks = _scale_shape(param, block_size)
    codes, scales = (exp_avg_codes, exp_avg_sq_codes), (exp_avg_scale, exp_avg_sq_scale)
    if any(code.dtype != torch.uint8 or code.shape != param.shape for code in codes) or grad.shape != param.shape:
        return "codes must be uint8, and codes and gradient of the parameter's shape"
    if any(scale.dtype != torch.float32 or tuple(scale.shape) != blocks for scale in scales):
        return f"scales must be float32 of shape {blocks}"
    library, reason = _library()
    if library is None:
        return reason
    if block_size > library.aotrain_adamw_8bit_max_block():
        return f"blocks are limited to {library.aotrain_adamw_8bit_max_block()} elements"
    return None


def _scale_shape(param: torch.Tensor, block_size: int) -> tuple[int, int]:
    row_length = param.shape[1:].numel()
    return param.shape[0], -(-row_length // block_size)


@functools.lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = native_library("adamw_8bit")
    if library is not None:
        pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.aotrain_adamw_8bit.restype = None
        library.aotrain_adamw_8bit.argtypes = (
            *(pointer, number, pointer, number),  # parameter, gradient
            *(pointer, pointer, pointer, pointer),  # state
            *(count, count, count),
            *(ctypes.POINTER(_Scalars), number, number),
        )
        library.aotrain_adamw_8bit_max_block.restype = count
    return library, reason


def _cpu(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_codes: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq_codes: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    *,
    one_minus_beta1: float,
    one_minus_beta2: float,
    eps: float,
    decay_factor: float,
    coupled_decay: float,
    step_size: float,
    inv_sqrt_bias_correction2: float,
    block_size: int,
    maximize: bool = False,
    isa: int | None = None,
) -> None:
    """The C++ kernel; tests choose its instruction set."""
    state = (exp_avg_codes, exp_avg_scale, exp_avg_sq_codes, exp_avg_sq_scale)
    problem = adamw_8bit_problem(param, grad, *state, block_size=block_size)
    library, _ = _library()
    if problem is not None or library is None:
        raise RuntimeError(f"aotrain::adamw_8bit_ cannot run: {problem}.")
    if param.numel() == 0:
        return
    scalars = _Scalars(
        one_minus_beta1,
        one_minus_beta2,
        eps,
        decay_factor,
        coupled_decay,
        step_size,
        inv_sqrt_bias_correction2,
        maximize,
    )
    library.aotrain_adamw_8bit(
        *(param.data_ptr(), param.dtype == torch.bfloat16, grad.data_ptr(), grad.dtype == torch.bfloat16),
        *(tensor.data_ptr() for tensor in state),
        *(param.shape[0], param.shape[1:].numel(), block_size),
        *(ctypes.byref(scalars), library.aotrain_adamw_8bit_isa() if isa is None else isa),
        max(1, min(torch.get_num_threads(), param.numel() // _MIN_PER_THREAD)),
    )


def _fake(*tensors: torch.Tensor, **scalars: float) -> None:
    """Nothing to allocate."""


LIBRARY.impl("adamw_8bit_", _cpu, "CPU")
torch.library.register_fake("aotrain::adamw_8bit_", _fake, lib=LIBRARY)
