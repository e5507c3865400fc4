"""scaled_grouped_mm: matrix products of the groups of rows that a mixture-of-experts layer sorts its tokens into.

Two layouts, each in quantized and in high precision, with the rows of group e of M written [e]:

    rows:        output[M, N][e]  = a[M, K][e] @ b[E, N, K][e].T           forward and grad_input ("2d-3d")
    contracted:  output[E, N, K]  = a[N, M][:, e] @ b[K, M][:, e].T        grad_weight ("2d-2d")

Each group is the product that `scaled_mm` gives it alone. Rows that belong to no group are zero in the output, and a
group without rows has a product of zeros; what torch's own grouped products leave there is whatever was in memory.
"""

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, ScaledTensor, Scaling
from aotrain.formats.scaling import Block
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.groups import GroupLayout, group_bounds
from aotrain.kernels.scaled_mm import scaled_mm

_OPERANDS = ", ".join(
    f"Tensor {name}, Tensor {name}_scale, str {name}_element, str {name}_scale_format, int[2] {name}_block"
    for name in "ab"
)
_PRODUCT = "ScalarType out_dtype, bool fast_accum, bool emulate"
LIBRARY.define(f"scaled_grouped_mm({_OPERANDS}, Tensor ends, {_PRODUCT}) -> Tensor")
LIBRARY.define(
    f"scaled_grouped_mm_contracted({_OPERANDS}, Tensor ends, Tensor padded_ends, int rows, {_PRODUCT}) -> Tensor"
)
LIBRARY.define("grouped_mm(Tensor a, Tensor b, Tensor ends) -> Tensor")
LIBRARY.define("grouped_mm_contracted(Tensor a, Tensor b, Tensor ends) -> Tensor")


def scaled_grouped_mm(
    a: ScaledTensor,
    b: ScaledTensor,
    layout: GroupLayout,
    out_dtype: torch.dtype,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
) -> torch.Tensor:
    """`output[M, N] = a[M, K] @ b[E, N, K].T`, each row with the matrix of its group.

    Args:
        a: [M, K] from `grouped_cast`.
        b: [E, N, K] with the scales of E matrices that `scaled_mm` takes as its right operand.
        layout: of the groups.
        out_dtype: float32, bfloat16 or float16.
        fast_accum, emulate: as in `scaled_mm`.

    Raises:
        ValueError: scales that do not go together.
        RuntimeError: the GPU has no such product and `emulate` is off.
    """
    return torch.ops.aotrain.scaled_grouped_mm(*_operand(a), *_operand(b), layout.ends, out_dtype, fast_accum, emulate)


def scaled_grouped_mm_contracted(
    a: ScaledTensor,
    b: ScaledTensor,
    layout: GroupLayout,
    out_dtype: torch.dtype,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
) -> torch.Tensor:
    """`output[E, N, K]`, for each group `a[N, its rows] @ b[K, its rows].T`.

    Args:
        a: [N, padded_rows] from `grouped_cast_t`.
        b: [K, padded_rows] likewise.
        layout: of both casts.
        out_dtype, fast_accum, emulate: as in `scaled_grouped_mm`, which raises the same.
    """
    return torch.ops.aotrain.scaled_grouped_mm_contracted(
        *_operand(a), *_operand(b), layout.ends, layout.padded_ends, layout.rows, out_dtype, fast_accum, emulate
    )


def grouped_mm(a: torch.Tensor, b: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """`output[M, N] = a[M, K] @ b[E, K, N]` in high precision, each row with the matrix of its group."""
    return torch.ops.aotrain.grouped_mm(a, b, layout.ends)


def grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """`output[E, N, K] = a[M, N].T @ b[M, K]` of each group's rows, in high precision."""
    return torch.ops.aotrain.grouped_mm_contracted(a, b, layout.ends)


def _operand(q: ScaledTensor) -> tuple[torch.Tensor, torch.Tensor, str, str, Block]:
    return q.data, q.scale, q.scaling.element.name, q.scaling.scale.name, q.scaling.block


def _scaling(element: str, scale: str, block: Block) -> Scaling:
    return Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=(block[0], block[1]))


def _reference(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    a_scale_format: str,
    a_block: Block,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    b_scale_format: str,
    b_block: Block,
    ends: torch.Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    a_scaling, b_scaling = _scaling(a_element, a_scale_format, a_block), _scaling(b_element, b_scale_format, b_block)
    output = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for group, (start, end) in enumerate(group_bounds(ends, a.shape[0])):
        if end > start:
            output[start:end] = scaled_mm(
                ScaledTensor(a[start:end], a_scale[start:end], a_scaling),
                ScaledTensor(b[group], b_scale[group], b_scaling),
                *(out_dtype,),
                fast_accum=fast_accum,
                emulate=emulate,
            )
    return output


def _reference_contracted(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_element: str,
    a_scale_format: str,
    a_block: Block,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_element: str,
    b_scale_format: str,
    b_block: Block,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    rows: int,
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
) -> torch.Tensor:
    a_scaling, b_scaling = _scaling(a_element, a_scale_format, a_block), _scaling(b_element, b_scale_format, b_block)
    output = a.new_zeros((ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)
    starts = [0, *padded_ends.tolist()]
    for group, (start, end) in enumerate(group_bounds(ends, rows)):
        if end > start:
            first, size = starts[group], end - start
            output[group] = scaled_mm(
                _columns(a, a_scale, a_scaling, group, first, size),
                _columns(b, b_scale, b_scaling, group, first, size),
                *(out_dtype,),
                fast_accum=fast_accum,
                emulate=emulate,
            )
    return output


def _columns(
    data: torch.Tensor, scale: torch.Tensor, scaling: Scaling, group: int, first: int, size: int
) -> ScaledTensor:
    """A group's part of what `grouped_cast_t` returns, without its padding."""
    block = scaling.block[1]
    if block == -1:
        scale = scale[group].unsqueeze(1)
    else:
        scale = scale[:, first // block : -(-(first + size) // block)].contiguous()
    return ScaledTensor(data[:, first : first + size].contiguous(), scale, scaling)


def _fake(a: torch.Tensor, *arguments: object) -> torch.Tensor:
    b, out_dtype = arguments[4], arguments[10]
    assert isinstance(b, torch.Tensor)
    assert isinstance(out_dtype, torch.dtype)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _fake_contracted(a: torch.Tensor, *arguments: object) -> torch.Tensor:
    b, ends, out_dtype = arguments[4], arguments[9], arguments[12]
    assert isinstance(b, torch.Tensor)
    assert isinstance(ends, torch.Tensor)
    assert isinstance(out_dtype, torch.dtype)
    return a.new_empty((ends.shape[0], a.shape[0], b.shape[0]), dtype=out_dtype)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = a.new_zeros((a.shape[0], b.shape[2]))
    for group, (start, end) in enumerate(group_bounds(ends, a.shape[0])):
        if end > start:
            output[start:end] = a[start:end] @ b[group]
    return output


def _grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = a.new_zeros((ends.shape[0], a.shape[1], b.shape[1]))
    for group, (start, end) in enumerate(group_bounds(ends, a.shape[0])):
        if end > start:
            output[group] = a[start:end].t() @ b[start:end]
    return output


def _fake_grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[2]))


def _fake_grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty((ends.shape[0], a.shape[1], b.shape[1]))


for _name, _implementation, _fake_implementation in (
    ("scaled_grouped_mm", _reference, _fake),
    ("scaled_grouped_mm_contracted", _reference_contracted, _fake_contracted),
    ("grouped_mm", _grouped_mm, _fake_grouped_mm),
    ("grouped_mm_contracted", _grouped_mm_contracted, _fake_grouped_mm_contracted),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aotrain::{_name}", _fake_implementation, lib=LIBRARY)
