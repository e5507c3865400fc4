"""grouped_cast: quantize the rows of a matrix that is sorted by group, or each group's transposition.

Every group has the codes and scales that `scaled_cast` gives it alone: no block of elements with one scale reaches
across groups. With E groups in a matrix x [M, K] (`aotrain.kernels.groups`):

    grouped_cast      data [M, K]              group e is data[start:end], for a product with E matrices
    grouped_cast_t    data [K, padded_rows]    group e is data[:, padded start:padded end], for a product that contracts
                                               rows; it is the cast of the transposed group with zeros appended

One scale per group becomes one scale per row, so a product sees two kinds of scales only:

| block of the scaling | scale of grouped_cast | scale of grouped_cast_t    |
|----------------------|-----------------------|----------------------------|
| tensorwise, rowwise  | [M, 1]                | [E, K]                     |
| 1 x n                | [M, ceil(K / n)]      | [K, padded_rows / n]       |

What `grouped_cast` holds for rows of no group is unspecified; columns of no group in `grouped_cast_t` are zeros.
"""

from typing import Any

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    ELEMENT_FORMATS,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaledTensor,
    Scaling,
    scale_shape,
)
from aotrain.formats.scaling import Block
from aotrain.kernels._dispatch import triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.groups import GroupLayout, group_bounds, padded_rows, row_groups
from aotrain.kernels.scaled_cast import cast_kernel_gap, scaled_cast

_SCALING = "str element, str scale, int block_rows, int block_columns"
_SCALING_T = "str element_t, str scale_t, int block_rows_t, int block_columns_t"
LIBRARY.define(
    f"grouped_cast(Tensor x_hp, Tensor ends, {_SCALING}) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    f"grouped_cast_t(Tensor x_hp, Tensor ends, Tensor padded_ends, int align, {_SCALING})"
    " -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    f"grouped_cast_both(Tensor x_hp, Tensor ends, Tensor padded_ends, int align, {_SCALING}, {_SCALING_T})"
    " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def grouped_cast(x_hp: torch.Tensor, layout: GroupLayout, scaling: Scaling) -> ScaledTensor:
    """Quantize the rows of every group, rounding to nearest.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, any strides.
        layout: of its groups.
        scaling: target format; its block is tensorwise, rowwise or 1 x n.

    Returns:
        data [M, K] with one scale per row, or per n elements of a row.

    Raises:
        ValueError: the scaling has a `grouped_cast_gap`.
    """
    _check(scaling)
    data, scale = torch.ops.aotrain.grouped_cast(x_hp, layout.ends, *_names(scaling))
    return ScaledTensor(data, scale, rows_scaling(scaling))


def grouped_cast_t(x_hp: torch.Tensor, layout: GroupLayout, scaling: Scaling) -> ScaledTensor:
    """Quantize the transposition of every group, rounding to nearest.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, any strides.
        layout: of its groups; `align` is a multiple of n for blocks of 1 x n.
        scaling: of the transposition, in whose coordinates its block is: tensorwise, rowwise or 1 x n.

    Returns:
        data [K, layout.padded_rows]; scales as in the table above, so that for a rowwise block `scale_shape` does not
        hold: every group has its own.

    Raises:
        ValueError: the scaling has a `grouped_cast_gap`, or its blocks do not divide `align`.
    """
    _check_t(scaling, layout)
    data, scale = torch.ops.aotrain.grouped_cast_t(
        x_hp, layout.ends, layout.padded_ends, layout.align, *_names(scaling)
    )
    return ScaledTensor(data, scale, rows_scaling(scaling))


def grouped_cast_both(
    x_hp: torch.Tensor, layout: GroupLayout, scaling: Scaling, scaling_t: Scaling
) -> tuple[ScaledTensor, ScaledTensor]:
    """`grouped_cast` by `scaling` and `grouped_cast_t` by `scaling_t`, from one pass over x where there is a kernel."""
    _check(scaling)
    _check_t(scaling_t, layout)
    data, scale, data_t, scale_t = torch.ops.aotrain.grouped_cast_both(
        *(x_hp, layout.ends, layout.padded_ends, layout.align, *_names(scaling), *_names(scaling_t))
    )
    return ScaledTensor(data, scale, rows_scaling(scaling)), ScaledTensor(data_t, scale_t, rows_scaling(scaling_t))


def rows_scaling(scaling: Scaling) -> Scaling:
    """The scaling whose scales a cast of groups has: one per row where there is one per group."""
    if scaling.block != TENSORWISE:
        return scaling
    return Scaling(element=scaling.element, scale=scaling.scale, block=ROWWISE, rounding=scaling.rounding)


def grouped_cast_gap(scaling: Scaling) -> str | None:
    """What keeps rows of groups, or their transpositions, from being cast to this format; None when they are."""
    if scaling.block != TENSORWISE and scaling.block[0] != 1:
        return f"blocks of {scaling.block} would cover rows of several groups; want tensorwise, rowwise or 1 x n"
    if scaling != _scaling(*_names(scaling)[:2], scaling.block):
        return "elements depend on more than their block; want rounding to nearest without a transform before it"
    return None


def _check(scaling: Scaling) -> None:
    gap = grouped_cast_gap(scaling)
    if gap is not None:
        raise ValueError(f"Cast of groups to {scaling}: {gap}.")


def _check_t(scaling: Scaling, layout: GroupLayout) -> None:
    _check(scaling)
    if layout.align % max(1, scaling.block[1]):
        raise ValueError(
            f"A cast of transposed groups got groups of multiples of {layout.align} rows for {scaling}; want multiples "
            "of the block: lay the groups out with that `align`."
        )


def _names(scaling: Scaling) -> tuple[str, str, int, int]:
    return scaling.element.name, scaling.scale.name, *scaling.block


def _scaling(element: str, scale: str, block: Block) -> Scaling:
    return Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=block)


def _reference(
    x_hp: torch.Tensor, ends: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = _scaling(element, scale, (block_rows, block_columns))
    if scaling.block != TENSORWISE:  # no scale reaches beyond a row
        return scaled_cast(x_hp, scaling)[:2]
    data, scales = _fake(x_hp, ends, element, scale, block_rows, block_columns)
    data.view(torch.uint8).zero_()
    scales.copy_(torch.ones((), device=x_hp.device))
    for start, end in group_bounds(ends, x_hp.shape[0]):
        data[start:end], scales[start:end], _ = scaled_cast(x_hp[start:end], scaling)
    return data, scales


def _fake(
    x_hp: torch.Tensor, ends: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    block = rows_scaling(_scaling(element, scale, (block_rows, block_columns))).block
    data = x_hp.new_empty(x_hp.shape, dtype=ELEMENT_FORMATS[element].dtype)
    return data, x_hp.new_empty(scale_shape(x_hp.shape, block), dtype=SCALE_FORMATS[scale].dtype)


def _reference_t(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    align: int,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = _scaling(element, scale, (block_rows, block_columns))
    data, scales = _fake_t(x_hp, ends, padded_ends, align, element, scale, block_rows, block_columns)
    rows = group_bounds(ends, x_hp.shape[0])
    columns = group_bounds(padded_ends, data.shape[1])
    used = columns[-1][1] if columns else 0
    for group, ((start, end), (first, last)) in enumerate(
        zip([*rows, (0, 0)], [*columns, (used, data.shape[1])], strict=True)
    ):
        padding = last - first - (end - start)
        padded = torch.nn.functional.pad(x_hp[start:end], (0, 0, 0, padding)) if padding else x_hp[start:end]
        q = scaled_cast(padded.t(), scaling)
        data[:, first:last] = q.data
        if block_columns != -1:
            scales[:, first // block_columns : last // block_columns] = q.scale
        elif group < len(rows):
            scales[group] = q.scale.squeeze(1)
    return data, scales


def _fake_t(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    align: int,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x_hp.shape
    padded = padded_rows(rows, ends.shape[0], align)
    shape = (ends.shape[0], columns) if block_columns == -1 else (columns, padded // block_columns)
    data = x_hp.new_empty((columns, padded), dtype=ELEMENT_FORMATS[element].dtype)
    return data, x_hp.new_empty(shape, dtype=SCALE_FORMATS[scale].dtype)


def _two_casts(
    x_hp: torch.Tensor, ends: torch.Tensor, padded_ends: torch.Tensor, align: int, *scalings: str | int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whatever implements the two casts on the device."""
    return (
        *torch.ops.aotrain.grouped_cast(x_hp, ends, *scalings[:4]),
        *torch.ops.aotrain.grouped_cast_t(x_hp, ends, padded_ends, align, *scalings[4:]),
    )


def _fake_both(
    x_hp: torch.Tensor, ends: torch.Tensor, padded_ends: torch.Tensor, align: int, *scalings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake(x_hp, ends, *scalings[:4]), *_fake_t(x_hp, ends, padded_ends, align, *scalings[4:])


def _cuda(
    x_hp: torch.Tensor, ends: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if (block_rows, block_columns) == TENSORWISE:
        warn_slow("grouped_cast", "there is no kernel for one scale per group, so each is waited for and cast alone")
    return _reference(x_hp, ends, element, scale, block_rows, block_columns)


def _cuda_t(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    align: int,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, or else no wait at least. Tests call it with CPU tensors under Triton's interpreter."""
    scaling = _scaling(element, scale, (block_rows, block_columns))
    reason = _kernel_gap(x_hp, ends, align, None, scaling)
    if reason is None:
        from aotrain.kernels.triton.grouped_cast import grouped_cast_both as fused

        padded = padded_rows(x_hp.shape[0], ends.shape[0], align)
        return fused(x_hp, ends, padded_ends, padded, None, scaling.block, scaling.element, scaling.scale)[2:]
    if block_columns != -1:  # no block reaches across groups once they are padded
        return scaled_cast(pad_groups(x_hp, ends, padded_ends, align).t(), scaling)[:2]
    warn_slow("grouped_cast_t", f"{reason}, so each group is waited for and cast alone")
    return _reference_t(x_hp, ends, padded_ends, align, element, scale, block_rows, block_columns)


def _cuda_both(
    x_hp: torch.Tensor, ends: torch.Tensor, padded_ends: torch.Tensor, align: int, *scalings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One kernel for both where there is one. Tests call it with CPU tensors under Triton's interpreter."""
    scaling, scaling_t = (_scaling(names[0], names[1], names[2:]) for names in (scalings[:4], scalings[4:]))
    if _kernel_gap(x_hp, ends, align, scaling, scaling_t) is not None:
        return _two_casts(x_hp, ends, padded_ends, align, *scalings)
    from aotrain.kernels.triton.grouped_cast import grouped_cast_both as fused

    padded = padded_rows(x_hp.shape[0], ends.shape[0], align)
    return fused(x_hp, ends, padded_ends, padded, scaling.block, scaling_t.block, scaling.element, scaling.scale)


def _kernel_gap(
    x_hp: torch.Tensor, ends: torch.Tensor, align: int, scaling: Scaling | None, scaling_t: Scaling
) -> str | None:
    """What keeps a cast of transposed groups, with or without one of their rows, from being one fused kernel."""
    if x_hp.numel() == 0 or ends.numel() == 0:
        return "there is nothing to cast"
    if align % 16:
        return f"the kernel wants groups of multiples of 16 rows, got {align}"
    wanted = [scaling_t] if scaling is None else [scaling, scaling_t]
    if any(s.block not in (ROWWISE, BLOCKWISE_1X128) for s in wanted):
        return "there is no kernel for " + " and ".join(map(str, wanted))
    if len({(s.element, s.scale) for s in wanted}) > 1:
        return "there is no kernel for two formats at once"
    return cast_kernel_gap(scaling_t) or triton_problem(x_hp.device)


def pad_groups(x: torch.Tensor, ends: torch.Tensor, padded_ends: torch.Tensor, align: int) -> torch.Tensor:
    """[padded_rows, K]: every group at its padded place, zeros elsewhere. Waits for nothing."""
    rows = padded_rows(x.shape[0], ends.shape[0], align)
    if x.shape[0] == 0:
        return x.new_zeros((rows, x.shape[1]))
    group = row_groups(padded_ends, rows)
    zero = ends.new_zeros(1)
    # One past the last group, whose rows are all beyond its end.
    first, last, padded_first = (
        torch.cat(parts).index_select(0, group) for parts in ((zero, ends), (ends, zero), (zero, padded_ends))
    )
    source = torch.arange(rows, dtype=ends.dtype, device=x.device) - padded_first + first
    outside = source >= last
    return x.index_select(0, source.clamp_(max=x.shape[0] - 1)).masked_fill_(outside.unsqueeze(1), 0)


for _name, _implementation, _cuda_implementation, _fake_implementation in (
    ("grouped_cast", _reference, _cuda, _fake),
    ("grouped_cast_t", _reference_t, _cuda_t, _fake_t),
    ("grouped_cast_both", _two_casts, _cuda_both, _fake_both),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cuda_implementation, "CUDA")
    torch.library.register_fake(f"aotrain::{_name}", _fake_implementation, lib=LIBRARY)
