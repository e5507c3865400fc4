"""scaled_grouped_mm: matrix products of the groups of rows that a mixture-of-experts layer sorts its tokens into.

Two layouts, each in quantized and in high precision, with the rows of group e of M written [e]:

    rows:        output[M, N][e]  = a[M, K][e] @ b[E, N, K][e].T           forward and grad_input ("2d-3d")
    contracted:  output[E, N, K]  = a[N, M][:, e] @ b[K, M][:, e].T        grad_weight ("2d-2d")

Each group is the product that `scaled_mm` gives it alone. Rows that belong to no group are zero in the output, and a
group without rows has a product of zeros; what torch's own grouped products leave there is whatever was in memory.

On CPU this is a loop over groups. On a GPU (`_grouped_mm_cuda`) one kernel walks the groups by offsets that stay on the
device: no wait, and a launch can be captured in a CUDA graph.
"""

from typing import Any

import torch

from aotrain.formats import ELEMENT_FORMATS, SCALE_FORMATS, ScaledTensor, Scaling
from aotrain.formats.scaling import Block
from aotrain.kernels import _grouped_mm_cuda
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


def _operands(arguments: tuple[Any, ...]) -> tuple[ScaledTensor, ScaledTensor]:
    """Both operands from the first ten arguments of an op."""
    a, b = (
        ScaledTensor(
            *(data, scale),
            Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale_format], block=(block[0], block[1])),
        )
        for data, scale, element, scale_format, block in (arguments[:5], arguments[5:10])
    )
    return a, b


def _reference(*arguments: Any) -> torch.Tensor:
    a, b = _operands(arguments)
    ends, out_dtype, fast_accum, emulate = arguments[10:]
    output = a.data.new_empty((a.data.shape[0], b.data.shape[1]), dtype=out_dtype)
    bounds = group_bounds(ends, a.data.shape[0])
    output[bounds[-1][1] if bounds else 0 :] = 0
    for group, (start, end) in enumerate(bounds):
        if end > start:
            output[start:end] = scaled_mm(
                ScaledTensor(a.data[start:end], a.scale[start:end], a.scaling),
                ScaledTensor(b.data[group], b.scale[group], b.scaling),
                *(out_dtype,),
                fast_accum=fast_accum,
                emulate=emulate,
            )
    return output


def _reference_contracted(*arguments: Any) -> torch.Tensor:
    a, b = _operands(arguments)
    ends, padded_ends, rows, out_dtype, fast_accum, emulate = arguments[10:]
    output = a.data.new_empty((ends.shape[0], a.data.shape[0], b.data.shape[0]), dtype=out_dtype)
    columns = group_bounds(padded_ends, a.data.shape[1])
    for group, ((start, end), (first, _)) in enumerate(zip(group_bounds(ends, rows), columns, strict=True)):
        if end > start:
            output[group] = scaled_mm(
                _columns(a, group, first, end - start),
                _columns(b, group, first, end - start),
                *(out_dtype,),
                fast_accum=fast_accum,
                emulate=emulate,
            )
        else:
            output[group] = 0
    return output


def _columns(q: ScaledTensor, group: int, first: int, size: int) -> ScaledTensor:
    """A group's part of what `grouped_cast_t` returns, without its padding."""
    block = q.scaling.block[1]
    if block == -1:
        scale = q.scale[group].unsqueeze(1)
    else:
        scale = q.scale[:, first // block : -(-(first + size) // block)].contiguous()
    return ScaledTensor(q.data[:, first : first + size].contiguous(), scale, q.scaling)


def _cuda(*arguments: Any) -> torch.Tensor:
    a, b = _operands(arguments)
    ends, out_dtype, fast_accum, emulate = arguments[10:]
    output = _grouped_mm_cuda.scaled_rows(a, b, ends, out_dtype, fast_accum, emulate)
    return _reference(*arguments) if output is None else output


def _cuda_contracted(*arguments: Any) -> torch.Tensor:
    a, b = _operands(arguments)
    _, padded_ends, rows, out_dtype, fast_accum, emulate = arguments[10:]
    output = _grouped_mm_cuda.scaled_contracted(a, b, padded_ends, rows, out_dtype, fast_accum, emulate)
    return _reference_contracted(*arguments) if output is None else output


def _fake(a: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return a.new_empty((a.shape[0], arguments[4].shape[1]), dtype=arguments[10])


def _fake_contracted(a: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return a.new_empty((arguments[9].shape[0], a.shape[0], arguments[4].shape[0]), dtype=arguments[12])


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = a.new_empty((a.shape[0], b.shape[2]))
    bounds = group_bounds(ends, a.shape[0])
    output[bounds[-1][1] if bounds else 0 :] = 0
    for group, (start, end) in enumerate(bounds):
        if end > start:
            torch.mm(a[start:end], b[group], out=output[start:end])
    return output


def _grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = a.new_empty((ends.shape[0], a.shape[1], b.shape[1]))
    for group, (start, end) in enumerate(group_bounds(ends, a.shape[0])):
        if end > start:
            torch.mm(a[start:end].t(), b[start:end], out=output[group])
        else:
            output[group] = 0
    return output


def _cuda_grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = _grouped_mm_cuda.rows(a, b, ends)
    return _grouped_mm(a, b, ends) if output is None else output


def _cuda_grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    output = _grouped_mm_cuda.contracted(a, b, ends)
    return _grouped_mm_contracted(a, b, ends) if output is None else output


def _fake_grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[2]))


def _fake_grouped_mm_contracted(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty((ends.shape[0], a.shape[1], b.shape[1]))


for _name, _implementation, _cuda_implementation, _fake_implementation in (
    ("scaled_grouped_mm", _reference, _cuda, _fake),
    ("scaled_grouped_mm_contracted", _reference_contracted, _cuda_contracted, _fake_contracted),
    ("grouped_mm", _grouped_mm, _cuda_grouped_mm, _fake_grouped_mm),
    ("grouped_mm_contracted", _grouped_mm_contracted, _cuda_grouped_mm_contracted, _fake_grouped_mm_contracted),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cuda_implementation, "CUDA")
    torch.library.register_fake(f"aotrain::{_name}", _fake_implementation, lib=LIBRARY)
