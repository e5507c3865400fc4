"""nvfp4_grouped_mm: products of NVFP4 operands of groups of rows.

    rows:        output[M, N][e]  = a[M, K][e] @ b[E, N, K][e].T           forward and grad_input
    contracted:  output[E, N, K]  = a[N, M][:, e] @ b[K, M][:, e].T        grad_weight

Each group is the emulated product that `nvfp4_mm` gives it alone. Rows that belong to no group are zero in the output,
and a group without rows has a product of zeros.

On CPU this is a loop over groups. On a GPU `data * scale`, which is exact in bfloat16, goes through `torch._grouped_mm`
by offsets that stay on the device, and the two global scales are applied to its result; a result other than bfloat16
takes the loop, since torch's product rounds to bfloat16. NVFP4 products of the hardware are not used for groups yet.
"""

from typing import Any

import torch

from aotrain.kernels import _grouped_mm_cuda
from aotrain.kernels._dispatch import warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._nvfp4_cpu import decode_operand
from aotrain.kernels.groups import GroupLayout, group_bounds, row_groups
from aotrain.kernels.nvfp4_cast import BLOCK_SIZE, Nvfp4Operand
from aotrain.kernels.nvfp4_mm import nvfp4_mm

_OPERANDS = "Tensor a, Tensor a_scale, Tensor a_global, Tensor b, Tensor b_scale, Tensor b_global"
LIBRARY.define(f"nvfp4_grouped_mm({_OPERANDS}, Tensor ends, ScalarType out_dtype) -> Tensor")
LIBRARY.define(
    f"nvfp4_grouped_mm_contracted({_OPERANDS}, Tensor ends, Tensor padded_ends, ScalarType out_dtype) -> Tensor"
)


def nvfp4_grouped_mm(a: Nvfp4Operand, b: Nvfp4Operand, layout: GroupLayout, out_dtype: torch.dtype) -> torch.Tensor:
    """`output[M, N] = a[M, K] @ b[E, N, K].T`, each row with the matrix of its group.

    Args:
        a: rows from `nvfp4_grouped_cast`.
        b: from `nvfp4_batched_cast`.
        layout: of the groups.
        out_dtype: float32, bfloat16 or float16.
    """
    return torch.ops.aotrain.nvfp4_grouped_mm(*a, *b, layout.ends, out_dtype)


def nvfp4_grouped_mm_contracted(
    a: Nvfp4Operand, b: Nvfp4Operand, layout: GroupLayout, out_dtype: torch.dtype
) -> torch.Tensor:
    """`output[E, N, K]`, for each group `a[N, its rows] @ b[K, its rows].T`; transpositions of `nvfp4_grouped_cast`."""
    return torch.ops.aotrain.nvfp4_grouped_mm_contracted(*a, *b, layout.ends, layout.padded_ends, out_dtype)


def _reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    ends: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    output = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for group, (start, end) in enumerate(group_bounds(ends, a.shape[0])):
        if end > start:
            lhs = Nvfp4Operand(a[start:end], a_scale[start:end], a_global[group].view(1, 1))
            rhs = Nvfp4Operand(b[group], b_scale[group], b_global[group].view(1, 1))
            output[start:end] = nvfp4_mm(lhs, rhs, out_dtype, emulate=True)
    return output


def _reference_contracted(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    output = a.new_zeros((ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)
    first = 0
    for group, ((start, end), last) in enumerate(
        zip(group_bounds(ends, 2 * a.shape[1]), padded_ends.tolist(), strict=True)
    ):
        if end > start:
            lhs, rhs = (
                Nvfp4Operand(
                    data[:, first // 2 : last // 2].contiguous(),
                    scale[:, first // BLOCK_SIZE : last // BLOCK_SIZE].contiguous(),
                    level[group].view(1, 1),
                )
                for data, scale, level in ((a, a_scale, a_global), (b, b_scale, b_global))
            )
            output[group] = nvfp4_mm(lhs, rhs, out_dtype, emulate=True)
        first = last
    return output


def _cuda(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    ends: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Without waiting for the offsets. Tests call it with CPU tensors."""
    if min(*a.shape, *b.shape) == 0:
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    if out_dtype != torch.bfloat16:
        warn_slow("nvfp4_grouped_mm", _other_dtype(out_dtype))
        return _reference(a, a_scale, a_global, b, b_scale, b_global, ends, out_dtype)
    rhs = decode_operand(b.flatten(0, 1), b_scale.flatten(0, 1), out_dtype).unflatten(0, b.shape[:2])
    product = torch._grouped_mm(decode_operand(a, a_scale, out_dtype), rhs.mT, offs=ends)
    group = row_groups(ends, a.shape[0]).clamp_(max=ends.shape[0] - 1)
    scaled = product.float() * a_global[group].unsqueeze(1) * b_global[group].unsqueeze(1)
    return _grouped_mm_cuda.zero_ungrouped_rows(scaled.to(out_dtype), ends)


def _cuda_contracted(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Without waiting for the offsets. Tests call it with CPU tensors."""
    if min(*a.shape, *b.shape, *ends.shape) == 0:
        return a.new_zeros((ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)
    if out_dtype != torch.bfloat16:
        warn_slow("nvfp4_grouped_mm_contracted", _other_dtype(out_dtype))
        return _reference_contracted(a, a_scale, a_global, b, b_scale, b_global, ends, padded_ends, out_dtype)
    lhs, rhs = (decode_operand(data, scale, out_dtype) for data, scale in ((a, a_scale), (b, b_scale)))
    product = torch._grouped_mm(lhs, rhs.t(), offs=padded_ends)
    return (product.float() * a_global.view(-1, 1, 1) * b_global.view(-1, 1, 1)).to(out_dtype)


def _other_dtype(out_dtype: torch.dtype) -> str:
    return (
        f"torch._grouped_mm returns bfloat16, wanted is {out_dtype}, so each group is waited for and multiplied alone"
    )


def _fake(a: torch.Tensor, *arguments: Any) -> torch.Tensor:
    b, out_dtype = arguments[2], arguments[-1]
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _fake_contracted(a: torch.Tensor, *arguments: Any) -> torch.Tensor:
    b, ends, out_dtype = arguments[2], arguments[5], arguments[-1]
    return a.new_empty((ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)


for _name, _implementation, _cuda_implementation, _fake_implementation in (
    ("nvfp4_grouped_mm", _reference, _cuda, _fake),
    ("nvfp4_grouped_mm_contracted", _reference_contracted, _cuda_contracted, _fake_contracted),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cuda_implementation, "CUDA")
    torch.library.register_fake(f"aotrain::{_name}", _fake_implementation, lib=LIBRARY)
