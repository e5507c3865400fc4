"""MX casts on NVIDIA GPUs: the CUDA kernel of csrc/cuda/mx_cast.cu, called through ctypes.

One read of x gives blocks of 32 along its rows, along its columns (codes and scales of the transpose), or both, with
the scales in row-major order or as the tiles of 128 x 4 that tensor cores read. Bit for bit `formats.quantize`, packed
by `formats.pack_float4` and tiled by `formats.to_blocked`; no operator of torch.library uses it yet.

Bytes moved per element of a 16-bit x: 2 read, and 1 (e2m1: 1/2) + 1/32 written per direction.
"""

import ctypes
import functools
from array import array

import torch

from aotrain.formats import BLOCKWISE_1X32, ELEMENT_FORMATS, blocked_size, scale_shape
from aotrain.formats.scaling import Block
from aotrain.kernels._native import native_library

BLOCKWISE_32X1: Block = (32, 1)

# Enums Input, Element and Rounding of csrc/cuda/{mx_plan.h,mx_numerics.cuh}.
INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELEMENTS = {"float8_e4m3fn": 0, "float8_e5m2": 1, "float4_e2m1fn": 2}
ROUNDINGS = {"floor": 0, "ceil": 1, "even": 2, "rceil": 3}

_MIN_CAPABILITY = (9, 0)
_TILE = 128
_MAX_TILES = 2**31 - 1


@functools.lru_cache(maxsize=1)
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled kernel, None) or (None, why it is not there)."""
    found, reason = native_library("mx_cast", ".cu")
    return (found and declare(found)), reason


def declare(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    found.aotrain_mx_cast.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    found.aotrain_mx_cast_error.restype = ctypes.c_char_p
    return found


def problem(x_hp: torch.Tensor, element: str, rounding: str) -> str | None:
    """Why the kernel cannot cast this tensor; None when it can."""
    if not x_hp.is_cuda or torch.version.hip is not None:
        return f"the CUDA kernel needs a tensor on an NVIDIA GPU, got one on {x_hp.device}"
    found, reason = library()
    if found is None:
        return reason
    if (capability := torch.cuda.get_device_capability(x_hp.device)) < _MIN_CAPABILITY:
        return f"the CUDA kernel needs compute capability 9.0, {x_hp.device} has {capability[0]}.{capability[1]}"
    return unsupported(x_hp, element, rounding)


def unsupported(x_hp: torch.Tensor, element: str, rounding: str) -> str | None:
    """What no GPU's kernel can cast, and why; None for what it can."""
    if x_hp.dtype not in INPUTS or element not in ELEMENTS or rounding not in ROUNDINGS:
        return f"there is no CUDA kernel for {x_hp.dtype} to {element} with {rounding} scales"
    if x_hp.dim() < 2 or x_hp.layout != torch.strided:
        return "the tensor is sparse or not a matrix"
    if -(-x_hp.shape[-2] // _TILE) * -(-x_hp.shape[-1] // _TILE) * x_hp.shape[:-2].numel() > _MAX_TILES:
        return f"the tensor has more than {_MAX_TILES} tiles of 128 x 128"
    return None


def mx_cast_cuda(
    x_hp: torch.Tensor,
    element: str,
    rounding: str,
    *blocks: Block,
    blocked: bool,
    group_ends: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Cast a tensor without `problem` to MX, with one or two shapes of blocks in one read.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16; copied unless its rows or its columns are adjacent in
            memory. Leading dimensions are matrices of their own, such as the experts of a weight [E, N, K].
        element: "float8_e4m3fn", "float8_e5m2" or "float4_e2m1fn".
        rounding: of the scale, one of `formats.e8m0.E8M0_ROUNDINGS`.
        blocks: (1, 32), (32, 1), or both, in the order of the results.
        blocked: scales as tiles of 128 x 4, the padding zero, instead of row-major.
        group_ends: int32 [groups] on x's device, for the gradient of expert weights: the rows of a matrix x in groups
            that end there, each a multiple of 128, ascending. The blocked scales of (32, 1) are then those of each
            group's transpose, one after the other, as a grouped product over rows reads them; data and the scales of
            (1, 32) are as without. Scales of rows after the last group are not written.

    Returns:
        Data and scale per shape of blocks. (1, 32): data [..., rows, columns] in the element's dtype, e2m1 packed as
        uint8 [..., rows, ceil(columns / 2)]; scale float8_e8m0fnu [..., rows, ceil(columns / 32)], or
        [..., blocked_size] tiled. (32, 1): the same of the transpose, data [..., columns, rows].

    Raises:
        ValueError: other blocks, or groups of something else than a matrix with blocked scales.
        RuntimeError: the library is not there, or the launch failed.
    """
    if not blocks or len(set(blocks)) < len(blocks) or not {*blocks} <= {BLOCKWISE_1X32, BLOCKWISE_32X1}:
        raise ValueError(f"mx_cast_cuda got blocks {blocks}; want (1, 32), (32, 1), or both.")
    if group_ends is not None and (x_hp.dim() != 2 or not blocked or group_ends.dtype != torch.int32):
        raise ValueError(
            f"mx_cast_cuda got {group_ends.dtype} group_ends, a tensor of {x_hp.dim()} dimensions, blocked={blocked}; "
            "want int32 group_ends of a matrix, with blocked scales."
        )
    found, reason = library()
    if found is None:
        raise RuntimeError(f"The CUDA kernel of MX casts cannot run: {reason}.")
    results = {block: _outputs(x_hp if block == BLOCKWISE_1X32 else x_hp.mT, element, blocked) for block in blocks}
    if x_hp.numel():
        table, _kept = arguments(x_hp, element, rounding, results, blocked, group_ends)
        _launch(found, table, x_hp.device)
    return tuple(tensor for block in blocks for tensor in results[block])


def _outputs(x: torch.Tensor, element: str, blocked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized contiguous data and scales for blocks of 1 x 32 of x."""
    *batch, rows, columns = x.shape
    packed = element == "float4_e2m1fn"
    data = x.new_empty((*batch, rows, -(-columns // 2) if packed else columns), dtype=ELEMENT_FORMATS[element].dtype)
    *_, scale_rows, scale_columns = shape = scale_shape(x.shape, BLOCKWISE_1X32)
    scale = x.new_empty((*batch, blocked_size(scale_rows, scale_columns)) if blocked else shape, dtype=torch.uint8)
    return data, scale.view(torch.float8_e8m0fnu)


def arguments(
    x_hp: torch.Tensor,
    element: str,
    rounding: str,
    results: dict[Block, tuple[torch.Tensor, torch.Tensor]],
    blocked: bool,
    group_ends: torch.Tensor | None = None,
) -> tuple[array, tuple[torch.Tensor | None, ...]]:
    """(the struct Arguments of csrc/cuda/mx_plan.h, the tensors that it points to, which must outlive it)."""
    if group_ends is not None:
        x_hp, group_ends = x_hp.contiguous(), group_ends.contiguous()  # groups are of rows in memory
    x, transposed = _batch_of_matrices(x_hp, one_matrix=not blocked and BLOCKWISE_32X1 not in results)
    along_rows, along_columns = BLOCKWISE_1X32, BLOCKWISE_32X1
    if transposed:
        along_rows, along_columns = along_columns, along_rows
    outputs = [tensor.data_ptr() for block in (along_rows, along_columns) for tensor in results.get(block, ())]
    if along_rows not in results:
        outputs = [0, 0, *outputs]
    batch, rows, columns = x.shape
    strides = (x.stride(0) if batch > 1 else 0, x.stride(1) if rows > 1 else 0)
    kind = (INPUTS[x.dtype], ELEMENTS[element], ROUNDINGS[rounding], int(blocked), x.device.index or 0)
    groups = (0, 0) if group_ends is None else (group_ends.data_ptr(), group_ends.numel())
    table = array("q", (x.data_ptr(), *[*outputs, 0, 0][:4], batch, rows, columns, *strides, *kind, *groups))
    return table, (x, group_ends)


def _batch_of_matrices(x: torch.Tensor, one_matrix: bool) -> tuple[torch.Tensor, bool]:
    """(a view [batch, rows, columns] of x, or of its transpose, whose columns are adjacent; whether transposed).

    Copies only what has no such view. `one_matrix`: results are the same if all rows are of one matrix.
    """
    if x.dim() > 2 and one_matrix and x.is_contiguous():
        x = x.flatten(0, -2)
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x, False
    if x.stride(-2) == 1 or x.shape[-2] == 1:
        return x.mT, True
    return x.contiguous(), False


def _launch(found: ctypes.CDLL, table: array, device: torch.device) -> None:
    if device.type == "cuda":
        with torch.cuda.device(device):
            error = found.aotrain_mx_cast(table.buffer_info()[0], torch.cuda.current_stream().cuda_stream)
    else:  # the same kernel on a CPU: tests only
        error = found.aotrain_mx_cast(table.buffer_info()[0], None)
    if error:
        raise RuntimeError(f"The CUDA kernel of MX casts failed: {found.aotrain_mx_cast_error(error).decode()}.")
