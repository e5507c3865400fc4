"""The grouped products on CUDA: which kernel takes which operands.

| operands                              | kernel                                  | wants                   |
|---------------------------------------|-----------------------------------------|-------------------------|
| e4m3, row scales, bfloat16 result     | CUTLASS in `torch._scaled_grouped_mm`   | Hopper, K and N % 16    |
| float8 with row scales or 1 x 128     | `kernels/triton/grouped_mm.py`          | Ada or newer            |
| int8 with row scales                  | the same                                | Ampere or newer         |
| e4m3 with MX scales, bfloat16 result  | `_grouped_mx_cuda.py`, found by trying  | K % 32, N % 16          |
| MX, 4 bits, and all with emulate=True | dequantized, in `torch._grouped_mm`     | power-of-two scales     |
| bfloat16                              | `torch._grouped_mm`                     | rows of multiples of 8  |

What torch's kernels demand was read in their source (aten/src/ATen/native/cuda/GroupMMCommon.cuh): a jagged dimension
has no demand where it is not the contiguous one, so the rows of [M, K] are not padded; where it is, every group is a
positive multiple of 16 bytes, which `grouped_cast_t` provides. None of them writes rows that belong to no group.

Every function returns None where it has no kernel, after saying so once; the caller then loops over groups.
"""

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT8_E4M3,
    ROWWISE,
    TENSORWISE,
    ScaledTensor,
    decode_elements,
    dequantize,
)
from aotrain.formats.scaling import scale_to_float
from aotrain.kernels import _grouped_mx_cuda
from aotrain.kernels._dispatch import FLOAT8_CAPABILITY, MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels.groups import row_groups

# Of CUTLASS' kernel: 16 bytes of 8-bit codes, and fewer groups than it has threads for.
_CUTLASS_ALIGNMENT = 16
_CUTLASS_GROUPS = 1024
# int8 sums of so many products fit int32 (`scaled_mm`).
_INT32_TERMS = 2**17
# Rows of the right operand that share a scale, as the Triton kernels count them.
_SCALED_ROWS = {ROWWISE: 0, TENSORWISE: 0, BLOCKWISE_1X128: 1, BLOCKWISE_128X128: 128}


def scaled_rows(
    a: ScaledTensor, b: ScaledTensor, ends: torch.Tensor, out_dtype: torch.dtype, fast_accum: bool, emulate: bool
) -> torch.Tensor | None:
    """`scaled_grouped_mm` on the device of its operands."""
    (rows, contracted), columns = a.data.shape, b.data.shape[1]
    if min(rows, columns, contracted, ends.shape[0]) == 0:
        return a.data.new_zeros((rows, columns), dtype=out_dtype)
    way = _way(a, b, contracted, columns, ends.shape[0], contracted, out_dtype, emulate)
    if way == "mx":
        return zero_ungrouped_rows(_grouped_mx_cuda.rows(a, b, ends), ends)
    if way == "cutlass":
        return zero_ungrouped_rows(cutlass_rows(a, b, ends, fast_accum), ends)
    if way == "triton":
        return triton_rows(a, b, ends, out_dtype, fast_accum)
    if way == "emulated" and contracted % 8 == 0:
        return zero_ungrouped_rows(emulated_rows(a, b, ends), ends)
    return _no_kernel("scaled_grouped_mm", way, f"{contracted} columns")


def scaled_contracted(
    a: ScaledTensor,
    b: ScaledTensor,
    padded_ends: torch.Tensor,
    rows: int,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor | None:
    """`scaled_grouped_mm_contracted` on the device of its operands."""
    shape = (padded_ends.shape[0], a.data.shape[0], b.data.shape[0])
    if min(*shape, rows) == 0:
        return a.data.new_zeros(shape, dtype=out_dtype)
    way = _way(a, b, a.data.shape[1], shape[2], shape[0], rows, out_dtype, emulate)
    if way == "mx":
        return _grouped_mx_cuda.contracted(a, b, padded_ends)
    if way == "cutlass":
        return cutlass_contracted(a, b, padded_ends, fast_accum)
    if way == "triton" and a.data.shape[1] % 16 == 0:
        return triton_contracted(a, b, padded_ends, out_dtype, fast_accum)
    if way == "emulated" and a.data.shape[1] % 8 == 0:
        return emulated_contracted(a, b, padded_ends)
    return _no_kernel("scaled_grouped_mm_contracted", way, f"groups in {a.data.shape[1]} columns")


def rows(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
    """`grouped_mm`: a [M, K] with the matrices b [E, K, N]."""
    if min(a.numel(), b.numel()) == 0:
        return a.new_zeros((a.shape[0], b.shape[2]))
    if _high_precision_gap("grouped_mm", a, b, a.shape[1], b.shape[2]):
        return None
    return zero_ungrouped_rows(torch._grouped_mm(_dense(a), _dense(b), offs=ends), ends)


def contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
    """`grouped_mm_contracted`: the rows of a [M, N] and b [M, K]."""
    if min(a.numel(), b.numel(), ends.numel()) == 0:
        return a.new_zeros((ends.shape[0], a.shape[1], b.shape[1]))
    if _high_precision_gap("grouped_mm_contracted", a, b, a.shape[1], b.shape[1]):
        return None
    # Groups lie along the rows of both, the dimension that is not contiguous, which may begin and end anywhere.
    return torch._grouped_mm(a.contiguous().t(), b.contiguous(), offs=ends)


def cutlass_rows(a: ScaledTensor, b: ScaledTensor, ends: torch.Tensor, fast_accum: bool) -> torch.Tensor:
    """bfloat16 [M, N]; rows of no group are undefined."""
    return torch._scaled_grouped_mm(
        *(a.data, b.data.mT, a.scale.view(-1), _row_scales(b)),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )


def cutlass_contracted(a: ScaledTensor, b: ScaledTensor, padded_ends: torch.Tensor, fast_accum: bool) -> torch.Tensor:
    """bfloat16 [E, N, K]."""
    return torch._scaled_grouped_mm(
        *(a.data, b.data.t(), a.scale.view(-1), b.scale.view(-1)),
        offs=padded_ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )


def triton_rows(
    a: ScaledTensor, b: ScaledTensor, ends: torch.Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> torch.Tensor:
    """[M, N], with zeros in rows of no group. Tests call it with CPU tensors under Triton's interpreter."""
    from aotrain.kernels.triton.grouped_mm import grouped_mm

    scaled = _SCALED_ROWS[b.scaling.block]
    b_scale = b.scale if scaled else _row_scales(b)
    return grouped_mm(a.data, a.scale, b.data, b_scale, scaled, ends, out_dtype, fast_accum)


def triton_contracted(
    a: ScaledTensor, b: ScaledTensor, padded_ends: torch.Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> torch.Tensor:
    """[E, N, K]. Tests call it with CPU tensors under Triton's interpreter."""
    from aotrain.kernels.triton.grouped_mm import grouped_mm_contracted

    scaled = _SCALED_ROWS[b.scaling.block]
    return grouped_mm_contracted(a.data, a.scale, b.data, b.scale, scaled, padded_ends, out_dtype, fast_accum)


def emulated_rows(a: ScaledTensor, b: ScaledTensor, ends: torch.Tensor) -> torch.Tensor:
    """bfloat16 [M, N] from operands that are exact in bfloat16; rows of no group are undefined."""
    lhs, rhs = dequantize(a, torch.bfloat16), dequantize(b, torch.bfloat16)
    return torch._grouped_mm(lhs, rhs.mT, offs=ends)


def emulated_contracted(a: ScaledTensor, b: ScaledTensor, padded_ends: torch.Tensor) -> torch.Tensor:
    """bfloat16 [E, N, K] from operands that are exact in bfloat16."""
    lhs, rhs = (_dequantize_columns(q, padded_ends) for q in (a, b))
    return torch._grouped_mm(lhs, rhs.t(), offs=padded_ends)


def zero_ungrouped_rows(output: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The output [M, N], its rows of no group set to zero."""
    output = output.contiguous()
    if triton_problem(output.device, MIN_CAPABILITY) is not None or not output.is_cuda:
        return output.masked_fill_((row_groups(ends, output.shape[0]) == ends.shape[0]).unsqueeze(1), 0)
    from aotrain.kernels.triton.groups import zero_ungrouped_rows as zero

    zero(output, ends)
    return output


def _way(
    a: ScaledTensor,
    b: ScaledTensor,
    stride: int,
    columns: int,
    num_groups: int,
    terms: int,
    out_dtype: torch.dtype,
    emulate: bool,
) -> str:
    """ "cutlass", "triton", "mx", "emulated", or what is missing for all of them.

    Raises:
        RuntimeError: float8 on a GPU without it.
    """
    device, element = a.data.device, a.scaling.element
    eight_bits = b.scaling.block in _SCALED_ROWS and not element.stored_as_codes
    if eight_bits and not emulate:
        if element.dtype == torch.int8:
            problem = triton_problem(device, MIN_CAPABILITY)
            return problem or ("triton" if terms <= _INT32_TERMS else f"{terms} products exceed int32")
        problem = triton_problem(device, FLOAT8_CAPABILITY)
        if problem is not None:
            raise RuntimeError(
                f"float8 grouped matrix product: {problem}. Set emulate=True to run it in bfloat16 arithmetic with "
                "float8 numerics (no speed-up), train with recipe int8_rowwise, or in bfloat16 on this GPU."
            )
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        return "cutlass" if hopper and cutlass_takes(a, b, stride, columns, num_groups, out_dtype) else "triton"
    if not emulate and device.type == "cuda" and _grouped_mx_cuda.takes(a, b, stride, columns, out_dtype):
        contracted = b.data.dim() == 2
        problem = _grouped_mx_cuda.problem(device, contracted=contracted)
        if problem is None:
            return "mx"
        warn_slow("scaled_grouped_mm_contracted" if contracted else "scaled_grouped_mm", problem)
    if not (a.scaling.scale.power_of_two and b.scaling.scale.power_of_two and out_dtype == torch.bfloat16):
        return "the emulation has no kernel for scales that are no powers of two, or another result than bfloat16"
    return "emulated"


def cutlass_takes(
    a: ScaledTensor, b: ScaledTensor, stride: int, columns: int, num_groups: int, out_dtype: torch.dtype
) -> bool:
    """Whether CUTLASS' kernel on Hopper multiplies these; the others, and other results, are Triton's.

    Args:
        a, b: operands with a scale per row, per 128 elements, or per matrix.
        stride: of the rows of both.
        columns: of the result.
        num_groups: E.
        out_dtype: of the result; a rounded bfloat16 would lose what another one holds.
    """
    return (
        _SCALED_ROWS[b.scaling.block] == 0
        and a.scaling.element == b.scaling.element == FLOAT8_E4M3
        and out_dtype == torch.bfloat16
        and stride % _CUTLASS_ALIGNMENT == 0
        and columns % _CUTLASS_ALIGNMENT == 0
        and num_groups < _CUTLASS_GROUPS
    )


def _no_kernel(op: str, way: str, shape: str) -> None:
    reason = way if way not in ("triton", "emulated") else f"the kernel does not take {shape}"
    warn_slow(op, f"{reason}, so each group is waited for and multiplied alone")


def _high_precision_gap(op: str, a: torch.Tensor, b: torch.Tensor, *columns: int) -> bool:
    """Whether torch's kernel does not take these; says so."""
    if a.dtype == b.dtype == torch.bfloat16 and all(size % 8 == 0 for size in columns):
        return False
    warn_slow(
        op,
        f"torch._grouped_mm takes bfloat16 with rows of multiples of 8, got {a.dtype} with {columns}, so each group is "
        "waited for and multiplied alone",
    )
    return True


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last two dimensions row-major or column-major and aligned; the gradient of a sum is neither."""
    aligned = all(stride % 8 == 0 for stride in x.stride() if stride != 1)
    strides = x.stride()[-2:]
    fits = max(strides) >= x.shape[-1 if strides[-1] == 1 else -2] and 1 in strides
    return x if aligned and fits and 0 not in strides else x.contiguous()


def _row_scales(b: ScaledTensor) -> torch.Tensor:
    """[E, N] from a scale per row, or one per matrix."""
    scale, rows = b.scale.squeeze(2), b.data.shape[1]
    return scale if scale.shape[1] == rows else scale.repeat(1, rows)


def _dequantize_columns(q: ScaledTensor, padded_ends: torch.Tensor) -> torch.Tensor:
    """What `grouped_cast_t` returned, in bfloat16."""
    if q.scaling.block[1] != -1:
        return dequantize(q, torch.bfloat16)
    group = row_groups(padded_ends, q.data.shape[1]).clamp_(max=padded_ends.shape[0] - 1)
    scale = scale_to_float(q.scale).index_select(0, group).t()  # [K, columns]
    return (decode_elements(q.data, torch.float32, q.scaling.element) * scale).to(torch.bfloat16)
