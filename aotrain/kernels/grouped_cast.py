"""grouped_cast: quantize the rows of a matrix that is sorted by group, or each group's transposition.

Every group has the codes and scales that `scaled_cast` gives it alone: no block of elements with one scale reaches
across groups. With E groups in a matrix x [M, K] and their end offsets (`aotrain.kernels.groups`):

    grouped_cast      data [M, K]      group e is data[start:end]            what a product with 3-D weights takes
    grouped_cast_t    data [K, M_pad]  group e is data[:, first:first + end - start]      what contracts the rows

`M_pad` is `padded_size(M, E, align)` and `first` the padded start of the group; columns between groups are zeros. One
scale per group becomes one scale per row, so a product sees two kinds of scales only:

| block of the scaling | scale of grouped_cast | scale of grouped_cast_t                                |
|----------------------|-----------------------|--------------------------------------------------------|
| tensorwise, rowwise  | [M, 1]                | [E, K]                                                 |
| 1 x n                | [M, ceil(K / n)]      | [K, M_pad / n], align is a multiple of n               |

Rows that belong to no group have codes in `grouped_cast` too, of themselves; no product reads them. Scales of padding
are 1.
"""

import torch

from aotrain.formats import ELEMENT_FORMATS, ROWWISE, SCALE_FORMATS, TENSORWISE, ScaledTensor, Scaling, scale_shape
from aotrain.formats.scaling import Block
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.groups import group_bounds, padded_offsets, padded_size
from aotrain.kernels.scaled_cast import scaled_cast

_SCALING = "str element, str scale, int block_rows, int block_columns"
LIBRARY.define(
    f"grouped_cast(Tensor x_hp, Tensor offsets, {_SCALING}) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    f"grouped_cast_t(Tensor x_hp, Tensor offsets, int align, {_SCALING}) -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def grouped_cast(x_hp: torch.Tensor, offsets: torch.Tensor, scaling: Scaling) -> ScaledTensor:
    """Quantize the rows of every group, rounding to nearest.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, any strides.
        offsets: int32 [E], end offsets of the groups.
        scaling: target format; its block is tensorwise, rowwise or 1 x n.

    Returns:
        data [M, K] with one scale per row, or per n elements of a row.

    Raises:
        ValueError: another block, stochastic rounding, or on CPU offsets out of order.
    """
    _check(scaling)
    data, scale = torch.ops.aotrain.grouped_cast(x_hp, offsets, *_names(scaling))
    return ScaledTensor(data, scale, rows_scaling(scaling))


def grouped_cast_t(x_hp: torch.Tensor, offsets: torch.Tensor, scaling: Scaling, align: int) -> ScaledTensor:
    """Quantize the transposition of every group, rounding to nearest.

    Args:
        x_hp: [M, K] float32, bfloat16 or float16, any strides.
        offsets: int32 [E], end offsets of the groups.
        scaling: of the transposition, in whose coordinates its block is: tensorwise, rowwise or 1 x n.
        align: columns that every group starts at a multiple of; for blocks of 1 x n a multiple of n.

    Returns:
        data [K, padded_size(M, E, align)]; scales as in the table above, so that for a rowwise block `scale_shape` does
        not hold: every group has its own.

    Raises:
        ValueError: another block or `align`, stochastic rounding, or on CPU offsets out of order.
    """
    _check(scaling)
    if align < 1 or (scaling.block[1] > 0 and align % scaling.block[1]):
        raise ValueError(f"grouped_cast_t got align={align} for {scaling}; want a multiple of the block's columns.")
    data, scale = torch.ops.aotrain.grouped_cast_t(x_hp, offsets, align, *_names(scaling))
    return ScaledTensor(data, scale, rows_scaling(scaling))


def rows_scaling(scaling: Scaling) -> Scaling:
    """The scaling whose scales a cast of groups has: one per row where there is one per group."""
    if scaling.block != TENSORWISE:
        return scaling
    return Scaling(element=scaling.element, scale=scaling.scale, block=ROWWISE, rounding=scaling.rounding)


def _check(scaling: Scaling) -> None:
    if scaling.rounding != "nearest":
        raise ValueError("Casts of groups round to nearest; use formats.quantize with noise for stochastic rounding.")
    if scaling.block != TENSORWISE and scaling.block[0] != 1:
        raise ValueError(
            f"Cast of groups got blocks of {scaling.block}, which would cover rows of several groups; want tensorwise, "
            "rowwise or 1 x n."
        )


def _names(scaling: Scaling) -> tuple[str, str, int, int]:
    return scaling.element.name, scaling.scale.name, *scaling.block


def _scaling(element: str, scale: str, block: Block) -> Scaling:
    return Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=block)


def _reference(
    x_hp: torch.Tensor, offsets: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = _scaling(element, scale, (block_rows, block_columns))
    if scaling.block != TENSORWISE:  # no scale reaches beyond a row
        return scaled_cast(x_hp, scaling)[:2]
    bounds = group_bounds(offsets, x_hp.shape[0])
    data = x_hp.new_empty(x_hp.shape, dtype=scaling.element.dtype)
    scales = x_hp.new_empty((x_hp.shape[0], 1), dtype=scaling.scale.dtype)
    for start, end in (*bounds, (bounds[-1][1] if bounds else 0, x_hp.shape[0])):
        q = scaled_cast(x_hp[start:end], scaling)
        data[start:end], scales[start:end] = q.data, q.scale
    return data, scales


def _fake(
    x_hp: torch.Tensor, offsets: torch.Tensor, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    block = rows_scaling(_scaling(element, scale, (block_rows, block_columns))).block
    data = x_hp.new_empty(x_hp.shape, dtype=ELEMENT_FORMATS[element].dtype)
    return data, x_hp.new_empty(scale_shape(x_hp.shape, block), dtype=SCALE_FORMATS[scale].dtype)


def _reference_t(
    x_hp: torch.Tensor, offsets: torch.Tensor, align: int, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = _scaling(element, scale, (block_rows, block_columns))
    data, scales = _fake_t(x_hp, offsets, align, element, scale, block_rows, block_columns)
    data.view(torch.uint8).zero_()
    scales.copy_(torch.ones((), device=x_hp.device))
    starts = [0, *padded_offsets(offsets, x_hp.shape[0], align).tolist()]
    for group, (start, end) in enumerate(group_bounds(offsets, x_hp.shape[0])):
        if start == end:
            continue
        q = scaled_cast(x_hp[start:end].t(), scaling)
        data[:, starts[group] : starts[group] + end - start] = q.data
        if block_columns == -1:
            scales[group] = q.scale.squeeze(1)
        else:
            first = starts[group] // block_columns
            scales[:, first : first + q.scale.shape[1]] = q.scale
    return data, scales


def _fake_t(
    x_hp: torch.Tensor, offsets: torch.Tensor, align: int, element: str, scale: str, block_rows: int, block_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x_hp.shape
    padded = padded_size(rows, offsets.shape[0], align)
    shape = (offsets.shape[0], columns) if block_columns == -1 else (columns, padded // block_columns)
    data = x_hp.new_empty((columns, padded), dtype=ELEMENT_FORMATS[element].dtype)
    return data, x_hp.new_empty(shape, dtype=SCALE_FORMATS[scale].dtype)


LIBRARY.impl("grouped_cast", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::grouped_cast", _fake, lib=LIBRARY)
LIBRARY.impl("grouped_cast_t", _reference_t, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::grouped_cast_t", _fake_t, lib=LIBRARY)
