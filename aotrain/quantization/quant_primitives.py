"""Affine quantization of tensors in blocks of any shape, with the signatures that users of torchao's primitives know.

The arithmetic is that of `formats.AffineFormat`: tensors are rearranged so that a block is a row. `block_size` has one
size per dimension, which must divide it; `quantization.get_block_size` makes it of a granularity.

    scale, zero_point = choose_qparams_affine(w, MappingType.SYMMETRIC, (1, 32), torch.int8, -8, 7)
    codes = quantize_affine(w, (1, 32), scale, zero_point, torch.int8, -8, 7)
    w_hat = dequantize_affine(codes, (1, 32), scale, zero_point, torch.int8, -8, 7, output_dtype=w.dtype)
"""

import math
from collections.abc import Sequence

import torch

from aotrain.formats import AffineFormat, AffineTensor, MappingType, ZeroPointDomain

_BOUNDS = {
    **{getattr(torch, f"int{bits}"): (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(1, 9)},
    **{getattr(torch, f"uint{bits}"): (0, 2**bits - 1) for bits in range(1, 9)},
}


@torch.no_grad()
def choose_qparams_affine(
    input: torch.Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype = torch.int32,
    keepdim: bool = False,
    *,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of the blocks of a tensor.

    Args:
        input: float32, bfloat16 or float16; the arithmetic is in its dtype.
        mapping_type: how values are laid onto codes.
        block_size: elements of a block along every dimension.
        target_dtype: int1 to int8 or uint1 to uint8: the range of codes where the next two do not say it.
        quant_min: smallest code.
        quant_max: largest code.
        eps: smallest scale; None: the smallest normal number of the input's dtype.
        scale_dtype: None: the input's.
        zero_point_dtype: of zero points that are codes; those that are values have the dtype of the scale.
        keepdim: keep dimensions that one block covers, with size 1.
        zero_point_domain: whether zero points are codes or values.

    Returns:
        Both with an element per block: [..., size / block size, ...], without the dimensions that one block covers.

    Raises:
        ValueError: another dtype, more than 8 bits, or sizes that do not divide.
    """
    fmt = _format(target_dtype, quant_min, quant_max, mapping_type, zero_point_domain, scale_dtype, eps)
    rows, counts = _blocks_as_rows(input, block_size)
    scale, zero_point = fmt.parameters(rows)
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=zero_point_dtype)
    elif zero_point_domain is not ZeroPointDomain.FLOAT:
        zero_point = zero_point.to(zero_point_dtype)
    if not keepdim:
        sizes = zip(counts, input.shape, block_size, strict=True)
        counts = tuple(count for count, size, block in sizes if block == 1 or block != size)
    return scale.reshape(counts), zero_point.reshape(counts)


@torch.no_grad()
def quantize_affine(
    input: torch.Tensor,
    block_size: Sequence[int],
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    output_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    *,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> torch.Tensor:
    """Codes of a tensor with given scales.

    Args:
        input: as for `choose_qparams_affine`.
        block_size: likewise.
        scale: one per block, in any shape of that many elements in their order.
        zero_point: likewise, or None: zero.
        output_dtype: of the codes; those of fewer than 8 bits come as int8 or uint8.
        quant_min: likewise.
        quant_max: likewise.
        zero_point_domain: likewise.

    Returns:
        Codes in the shape of the input.

    Raises:
        ValueError: as for `choose_qparams_affine`, or another number of scales.
    """
    fmt = _format(output_dtype, quant_min, quant_max, MappingType.SYMMETRIC, zero_point_domain)
    rows, counts = _blocks_as_rows(input, block_size)
    zero_points = None if zero_point is None else _per_row(zero_point, counts)
    codes = fmt.quantize(rows, _per_row(scale, counts), zero_points).codes
    return _rows_as_blocks(codes, input.shape, block_size).to(_storage(output_dtype))


@torch.no_grad()
def dequantize_affine(
    input: torch.Tensor,
    block_size: Sequence[int],
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    input_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    *,
    output_dtype: torch.dtype = torch.float32,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> torch.Tensor:
    """Values of codes.

    Args:
        input: codes, as `quantize_affine` returns them.
        block_size: as for `choose_qparams_affine`.
        scale: as for `quantize_affine`.
        zero_point: likewise.
        input_dtype: what the codes are of, as `target_dtype` of `choose_qparams_affine`.
        quant_min: likewise.
        quant_max: likewise.
        output_dtype: of the arithmetic and of the result.
        zero_point_domain: likewise.

    Returns:
        Values in the shape of the input.

    Raises:
        ValueError: as for `quantize_affine`.
    """
    fmt = _format(input_dtype, quant_min, quant_max, MappingType.SYMMETRIC, zero_point_domain)
    rows, counts = _blocks_as_rows(input, block_size)
    zero_points = None if zero_point is None else _per_row(zero_point, counts)
    values = fmt.dequantize(AffineTensor(rows, _per_row(scale, counts), zero_points), output_dtype)
    return _rows_as_blocks(values, input.shape, block_size)


def get_group_qparams_symmetric(
    w: torch.Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    precision: torch.dtype = torch.float32,
    mapping_type: MappingType = MappingType.SYMMETRIC,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, both in `precision`, of groups along the rows of a matrix.

    Args:
        w: [N, K] float32, bfloat16 or float16.
        n_bit: 1 to 8.
        groupsize: elements of a group; a row that is shorter is one group.
        precision: dtype of the results.
        mapping_type: how values are laid onto codes.
        eps: smallest scale.

    Returns:
        Two tensors [N, K / groupsize].

    Raises:
        ValueError: no matrix, other widths, or a group that does not divide K.
    """
    if w.dim() != 2 or not 1 <= n_bit <= 8:
        raise ValueError(
            f"get_group_qparams_symmetric got shape {tuple(w.shape)} and n_bit={n_bit}; want a matrix, 1 to 8."
        )
    lo, hi = _BOUNDS[getattr(torch, f"int{n_bit}")]
    block_size = (1, min(groupsize, w.shape[1]))
    return choose_qparams_affine(
        w, mapping_type, block_size, torch.int8, lo, hi, eps, precision, zero_point_dtype=precision, keepdim=True
    )


def _format(
    dtype: torch.dtype,
    quant_min: int | None,
    quant_max: int | None,
    mapping: MappingType,
    domain: ZeroPointDomain,
    scale_dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> AffineFormat:
    lo, hi = _BOUNDS.get(dtype, (None, None))
    lo, hi = (lo if quant_min is None else quant_min), (hi if quant_max is None else quant_max)
    if lo is None or hi is None:
        raise ValueError(
            f"Affine quantization got {dtype}; want int1 to int8, uint1 to uint8, or quant_min and quant_max."
        )
    return AffineFormat(int(lo), int(hi), mapping=mapping, domain=domain, scale_dtype=scale_dtype, eps=eps)


def _storage(dtype: torch.dtype) -> torch.dtype:
    if dtype in _BOUNDS:
        return torch.int8 if _BOUNDS[dtype][0] < 0 else torch.uint8
    return dtype


def _blocks_as_rows(x: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """[blocks, elements of a block], and the number of blocks along every dimension."""
    if len(block_size) != x.dim() or any(
        size < 1 or dim % size for dim, size in zip(x.shape, block_size, strict=False)
    ):
        raise ValueError(
            f"Affine quantization got shape {tuple(x.shape)} in blocks of {tuple(block_size)}; want one size per "
            "dimension, which divides it."
        )
    counts = tuple(dim // size for dim, size in zip(x.shape, block_size, strict=True))
    split = x.reshape([part for pair in zip(counts, block_size, strict=True) for part in pair])
    order = [*range(0, split.dim(), 2), *range(1, split.dim(), 2)]
    return split.permute(order).reshape(math.prod(counts), math.prod(block_size)), counts


def _rows_as_blocks(rows: torch.Tensor, shape: Sequence[int], block_size: Sequence[int]) -> torch.Tensor:
    counts = [dim // size for dim, size in zip(shape, block_size, strict=True)]
    blocks = rows.reshape(*counts, *block_size)
    order = [axis for dim in range(len(counts)) for axis in (dim, len(counts) + dim)]
    return blocks.permute(order).reshape(tuple(shape))


def _per_row(part: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    if part.numel() != math.prod(counts):
        raise ValueError(
            f"Affine quantization got {part.numel()} scales or zero points, of shape {tuple(part.shape)}; want "
            f"{math.prod(counts)}, one per block: {counts}."
        )
    return part.reshape(-1, 1)
