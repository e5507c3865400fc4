"""Adam(W) steps of many parameters, each in one fused pass: decode both moments, update, encode both, write back.

`aotrain::adam_` computes the bits of `aotrain.optim.step` on the state of `aotrain.optim.state`. It takes lists, so
that a GPU steps a whole model in a few launches. On CPU it is the C++ kernel of csrc/cpu/adam.cpp (`_adam_cpu`); there
is no other implementation: ask `adam_problem` first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from aotrain.kernels import _adam_cpu
from aotrain.kernels._dispatch import FLOAT8_CAPABILITY, MIN_CAPABILITY, triton_problem
from aotrain.kernels._library import LIBRARY

LIBRARY.define(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales,"
    " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_scales, *, str state_format, int block_size,"
    " float one_minus_beta1, float one_minus_beta2, float eps, float decay_factor, float coupled_decay,"
    " float step_size, float inv_sqrt_bias_correction2, bool maximize=False,"
    " int[] rounding_keys=[], int[] first_indices=[], int[] row_strides=[]) -> ()"
)

_DTYPES = (torch.float32, torch.bfloat16)
# A block and both its moments stay in the registers of one program of the Triton kernel.
_MAX_CUDA_BLOCK = 8192


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
    # For autograd, which would not notice that a tensor it saved has changed.
    torch.autograd.graph.increment_version([tensors.param for tensors in batch])


def adam_problem(tensors: AdamTensors, *, state_format: str, block_size: int) -> str | None:
    """Why no kernel can take this parameter; None when one can."""
    param, grad, *state = tensors[:6]
    present = [param, grad, *(tensor for tensor in state if tensor is not None)]
    device = param.device
    if device.type not in ("cpu", "cuda"):
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
    if device.type == "cuda":
        return _cuda_problem(device, state_format, block_size)
    return _adam_cpu.problem(state_format, block_size)


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


def _cuda_problem(device: torch.device, state_format: str, block_size: int) -> str | None:
    if state_format != "float32" and (block_size & (block_size - 1) or block_size > _MAX_CUDA_BLOCK):
        return f"the block size must be a power of two up to {_MAX_CUDA_BLOCK} on a GPU, not {block_size}"
    return triton_problem(device, FLOAT8_CAPABILITY if state_format == "float8_e4m3fn" else MIN_CAPABILITY)


def _cuda(*lists: Sequence[torch.Tensor], **options: Any) -> None:
    from aotrain.kernels.triton._adam_launch import adam_

    adam_(*lists, **options)


def _fake(*lists: Sequence[torch.Tensor], **scalars: object) -> None:
    """Nothing to allocate."""


def _signed(key: int) -> int:
    """The int64 with the bits of an unsigned 64-bit key."""
    return key - (1 << 64) if key >> 63 else key


LIBRARY.impl("adam_", _adam_cpu.adam_, "CPU")
LIBRARY.impl("adam_", _cuda, "CUDA")
torch.library.register_fake("aotrain::adam_", _fake, lib=LIBRARY)
