"""Adam(W) steps of many parameters, each in one fused pass: decode both moments, update, encode both, write back.

`aotrain::adam_` computes the bits of `aotrain.optim.step` on the state of `aotrain.optim.state`. It takes lists, so
that a GPU steps a whole model in a few launches. On CPU it is the C++ kernel of csrc/cpu/adam.cpp; there is no other
implementation: ask `adam_problem` first.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aotrain.kernels._library import LIBRARY
from aotrain.kernels._native import native_library

LIBRARY.define(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales,"
    " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_scales, *, str state_format, int block_size,"
    " float one_minus_beta1, float one_minus_beta2, float eps, float decay_factor, float coupled_decay,"
    " float step_size, float inv_sqrt_bias_correction2, bool maximize=False,"
    " int[] rounding_keys=[], int[] first_indices=[], int[] row_strides=[]) -> ()"
)

ISA_SCALAR, ISA_AVX512 = 0, 1

_DTYPES = (torch.float32, torch.bfloat16)
# Below this many parameters a thread costs more than it saves.
_MIN_PER_THREAD = 32768


class AdamTensors(NamedTuple):
    """One parameter of a fused step: what this rank holds of it.

    Attributes:
        param: [d0, ...], float32 or bfloat16, contiguous; a row is what follows dimension 0.
        grad: float32 or bfloat16, of the same shape.
        exp_avg, exp_avg_sq: uint8 codes, or float32 values for `state_format` "float32".
        exp_avg_scale, exp_avg_sq_scale: float32 [d0, ceil(row length / block_size)]; None for "float32".
        rounding_key: 64-bit Philox key of this step and parameter, for stochastic rounding.
        first_index: position of the first element in the global parameter, the Philox counter.
        row_stride: distance of the first elements of two rows in the global parameter.
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_scale: torch.Tensor | None
    exp_avg_sq: torch.Tensor
    exp_avg_sq_scale: torch.Tensor | None
    rounding_key: int = 0
    first_index: int = 0
    row_stride: int = 0


class AdamScalars(NamedTuple):
    """The scalars of one step, float64, rounded to float32 by the kernel; see `aotrain.optim.step`."""

    one_minus_beta1: float
    one_minus_beta2: float
    eps: float
    decay_factor: float
    coupled_decay: float
    step_size: float
    inv_sqrt_bias_correction2: float


def adam_step(
    batch: Sequence[AdamTensors],
    scalars: AdamScalars,
    *,
    state_format: str,
    block_size: int,
    maximize: bool = False,
    stochastic: bool = False,
) -> None:
    """Update parameters and state in place.

    Args:
        batch: parameters of one device, one dtype and one gradient dtype, for which `adam_problem` returned None.
        scalars: of this step, for all of them.
        state_format: "dynamic8", "dynamic4", "float8_e4m3fn" or "float32".
        block_size: elements per scale along a row.
        maximize: negate the gradients.
        stochastic: round bfloat16 parameters stochastically, with the bits of `rounding_key` and the element's index.
    """
    quantized = state_format != "float32"
    torch.ops.aotrain.adam_(
        [tensors.param for tensors in batch],
        [tensors.grad for tensors in batch],
        [tensors.exp_avg for tensors in batch],
        [tensors.exp_avg_scale for tensors in batch] if quantized else [],
        [tensors.exp_avg_sq for tensors in batch],
        [tensors.exp_avg_sq_scale for tensors in batch] if quantized else [],
        state_format=state_format,
        block_size=block_size,
        **scalars._asdict(),
        maximize=maximize,
        rounding_keys=[_signed(tensors.rounding_key) for tensors in batch] if stochastic else [],
        first_indices=[tensors.first_index for tensors in batch] if stochastic else [],
        row_strides=[tensors.row_stride for tensors in batch] if stochastic else [],
    )


def adam_problem(tensors: AdamTensors, *, state_format: str, block_size: int, stochastic: bool = False) -> str | None:
    """Why no kernel can take this parameter; None when one can."""
    param, grad, *state = tensors[:6]
    present = [param, grad, *(tensor for tensor in state if tensor is not None)]
    device = param.device
    if device.type != "cpu":
        return f"there is no kernel for {device.type} tensors"
    if any(tensor.device != device or tensor.layout != torch.strided for tensor in present):
        return f"a tensor is not dense on {device}"
    if param.dtype not in _DTYPES or grad.dtype not in _DTYPES:
        return f"there is no kernel for {param.dtype} parameters with {grad.dtype} gradients"
    if param.ndim < 1 or not all(tensor.is_contiguous() for tensor in present):
        return "a tensor is not contiguous"
    problem = _shape_problem(tensors, state_format, block_size)
    if problem is not None:
        return problem
    return _cpu_problem(state_format, block_size, stochastic and param.dtype == torch.bfloat16)


def _shape_problem(tensors: AdamTensors, state_format: str, block_size: int) -> str | None:
    param = tensors.param
    if tensors.grad.shape != param.shape:
        return "the gradient's shape is not the parameter's"
    row_length = param.shape[1:].numel()
    codes_shape, codes_dtype = tuple(param.shape), torch.uint8
    if state_format == "float32":
        codes_dtype = torch.float32
    elif state_format == "dynamic4":
        codes_shape = (param.shape[0], -(-row_length // 2))
        if block_size % 2:
            return "4-bit blocks of an odd size share bytes"
    if any(
        tuple(codes.shape) != codes_shape or codes.dtype != codes_dtype
        for codes in (tensors.exp_avg, tensors.exp_avg_sq)
    ):
        return f"the state must be {codes_dtype} of shape {codes_shape}"
    if state_format == "float32":
        return None
    scale_shape = (param.shape[0], -(-row_length // block_size))
    for scale in (tensors.exp_avg_scale, tensors.exp_avg_sq_scale):
        if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != scale_shape:
            return f"scales must be float32 of shape {scale_shape}"
    return None


class _Scalars(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in AdamScalars._fields),
        ("maximize", ctypes.c_int32),
    )


def _cpu_problem(state_format: str, block_size: int, stochastic: bool) -> str | None:
    library, reason = _library()
    if library is None:
        return reason
    if state_format != "dynamic8" or stochastic:
        return f"there is no CPU kernel for {state_format} state{' with stochastic rounding' if stochastic else ''}"
    if block_size > library.aotrain_adam_max_block():
        return f"blocks are limited to {library.aotrain_adam_max_block()} elements"
    return None


@functools.lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = native_library("adam")
    if library is not None:
        pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.aotrain_adam.restype = None
        library.aotrain_adam.argtypes = (
            *(pointer, number, pointer, number),  # parameter, gradient
            *(pointer, pointer, pointer, pointer),  # state
            *(count, count, count),
            *(ctypes.POINTER(_Scalars), number, number),
        )
        library.aotrain_adam_max_block.restype = count
    return library, reason


def _cpu(
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
    problem = _cpu_problem(state_format, block_size, bool(rounding_keys))
    library, _ = _library()
    if problem is not None or library is None:
        raise RuntimeError(f"aotrain::adam_ cannot run: {problem}.")
    c_scalars = _Scalars(**scalars, maximize=maximize)
    lists = (params, grads, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
    for param, grad, *state in zip(*lists, strict=True):
        if param.numel() == 0:
            continue
        library.aotrain_adam(
            *(param.data_ptr(), param.dtype == torch.bfloat16, grad.data_ptr(), grad.dtype == torch.bfloat16),
            *(tensor.data_ptr() for tensor in state),
            *(param.shape[0], param.shape[1:].numel(), block_size),
            *(ctypes.byref(c_scalars), library.aotrain_adam_isa() if isa is None else isa),
            max(1, min(torch.get_num_threads(), param.numel() // _MIN_PER_THREAD)),
        )


def _fake(*lists: Sequence[torch.Tensor], **scalars: object) -> None:
    """Nothing to allocate."""


def _signed(key: int) -> int:
    """The int64 with the bits of an unsigned 64-bit key."""
    return key - (1 << 64) if key >> 63 else key


LIBRARY.impl("adam_", _cpu, "CPU")
torch.library.register_fake("aotrain::adam_", _fake, lib=LIBRARY)
