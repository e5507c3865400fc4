"""scaled_cast: quantize a high-precision matrix, or it and its transposition; bit-identical to `formats.quantize`.

On CUDA, the elements, scales and blocks of the recipes run fused Triton kernels: rowwise in one read of a row-major
matrix, all others by tiles (`kernels/triton/scaled_cast_tiles.py`). On CPU, every scale of e4m3fn, e5m2 and e2m1 and
float32 scales of int8 are a C++ kernel (`_cast_cpu`) for every block shape. Everything else runs the definition itself,
on CPU also a cast with a given amax.
"""

from collections.abc import Sequence

import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    COLWISE,
    ELEMENT_FORMATS,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ScaledTensor,
    Scaling,
    is_mx,
    quantize,
    scale_shape,
)
from aotrain.formats.scaling import Block
from aotrain.kernels import _cast_cpu
from aotrain.kernels._dispatch import FLOAT8_CAPABILITY, MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels._padding import UNPADDED, Multiples, padded_shape, zero_pad
from aotrain.kernels.mx_cast import mx_cast, mx_cast_both, mx_cast_gap

LIBRARY.define(
    "scaled_cast(Tensor x_hp, str element, str scale, int block_rows, int block_columns, Tensor? amax=None,"
    " int[2] pad=[1, 1])"
    " -> (Tensor data, Tensor scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "scaled_cast_both(Tensor x_hp, str element, str scale, int block_rows, int block_columns,"
    " str element_t, str scale_t, int block_rows_t, int block_columns_t, int[2] pad=[1, 1], int[2] pad_t=[1, 1])"
    " -> (Tensor data, Tensor scale, Tensor data_t, Tensor scale_t)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_KERNEL_BLOCKS = (TENSORWISE, ROWWISE, COLWISE, BLOCKWISE_1X128, BLOCKWISE_128X128)
# Blocks that a transposition maps to themselves.
_SYMMETRIC_BLOCKS = (TENSORWISE, BLOCKWISE_128X128)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scaled_cast(
    x_hp: torch.Tensor, scaling: Scaling, *, amax: torch.Tensor | None = None, pad: Multiples = UNPADDED
) -> ScaledTensor:
    """Quantize, rounding to nearest.

    Args:
        x_hp: [..., rows, columns], float32, bfloat16 or float16, any strides.
        scaling: target format and block shape; its rounding must be "nearest" unless it is MX.
        amax: float32 `scale_shape(x.shape, block)`, the largest magnitudes that the scales come from, where x is a part
            of a larger matrix; by default those of x's own blocks. A GPU then reads x once, whatever the block.
        pad: multiples from 1 to 128 that rows and columns of the result are rounded up to. The result is that of x with
            zeros up to them (and of an amax that is 0 for blocks without elements of x); kernels write it at once.

    Returns:
        ScaledTensor with contiguous data [..., rows, columns] and scale `scale_shape(data.shape, block)`.

    Raises:
        ValueError: another rounding, x has fewer than 2 dimensions, amax has another shape or dtype, or pad is not two
            multiples from 1 to 128.
    """
    if is_mx(scaling) and amax is None:
        _check_unpadded(pad)
        return mx_cast(x_hp, scaling)
    if scaling.rounding != "nearest":
        raise ValueError("scaled_cast rounds to nearest; use formats.quantize with noise for stochastic rounding.")
    _check_pad(pad)
    data, scale = torch.ops.aotrain.scaled_cast(
        x_hp, scaling.element.name, scaling.scale.name, *scaling.block, amax, pad
    )
    return ScaledTensor(data, scale, scaling)


def scaled_cast_both(
    x_hp: torch.Tensor,
    scaling: Scaling,
    scaling_t: Scaling,
    *,
    pad: Multiples = UNPADDED,
    pad_t: Multiples = UNPADDED,
) -> tuple[ScaledTensor, ScaledTensor]:
    """`scaled_cast(x, scaling)` and `scaled_cast(x.t(), scaling_t)`, from one pass over x where there is a kernel.

    Args:
        x_hp: as for `scaled_cast`; the transposition exchanges its last two dimensions.
        scaling: of x; its rounding must be "nearest" unless both are MX.
        scaling_t: of the transposition, in whose coordinates its block is; likewise.
        pad: of the quantized x, as for `scaled_cast`.
        pad_t: of the quantized transposition, in its coordinates.

    Returns:
        The quantized x and the quantized transposition [..., columns, rows], both contiguous.
    """
    if is_mx(scaling) and is_mx(scaling_t):
        _check_unpadded(pad)
        _check_unpadded(pad_t)
        return mx_cast_both(x_hp, scaling, scaling_t)
    if scaling.rounding != "nearest" or scaling_t.rounding != "nearest":
        raise ValueError("scaled_cast_both rounds to nearest; use formats.quantize with noise for stochastic rounding.")
    _check_pad(pad)
    _check_pad(pad_t)
    data, scale, data_t, scale_t = torch.ops.aotrain.scaled_cast_both(
        x_hp,
        *(scaling.element.name, scaling.scale.name, *scaling.block),
        *(scaling_t.element.name, scaling_t.scale.name, *scaling_t.block),
        *(pad, pad_t),
    )
    return ScaledTensor(data, scale, scaling), ScaledTensor(data_t, scale_t, scaling_t)


def _check_unpadded(pad: Multiples) -> None:
    if tuple(pad) != UNPADDED:
        raise ValueError(f"MX casts got pad={pad}; want (1, 1): their products pad codes and scales together.")


def _check_pad(pad: Multiples) -> None:
    if len(pad) != 2 or not all(1 <= multiple <= 128 for multiple in pad):
        raise ValueError(f"scaled_cast got pad {pad}; want the multiples of rows and of columns, each from 1 to 128.")


def _reference(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    amax: torch.Tensor | None = None,
    pad: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[scale], block=(block_rows, block_columns))
    x, wanted = x_hp.contiguous(), scale_shape(x_hp.shape, scaling.block)
    if amax is None or (tuple(amax.shape) == wanted):  # otherwise quantize says so
        x = zero_pad(x, padded_shape(x.shape, (pad[0], pad[1])))
        amax = None if amax is None else zero_pad(amax, scale_shape(x.shape, scaling.block))
    q = quantize(x, scaling, amax=amax)
    return q.data, q.scale


def _cpu(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    amax: torch.Tensor | None = None,
    pad: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    if amax is not None or _cast_cpu.problem(x_hp, element, scale):
        return _reference(x_hp, element, scale, block_rows, block_columns, amax, pad)
    padded = zero_pad(x_hp, padded_shape(x_hp.shape, (pad[0], pad[1])))
    return _cast_cpu.scaled_cast(padded, element, scale, block_rows, block_columns)


def _cuda(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    amax: torch.Tensor | None = None,
    pad: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel where there is one. Tests call it with CPU tensors under Triton's interpreter."""
    block = (block_rows, block_columns)
    if x_hp.dim() < 2 or x_hp.dtype not in _KERNEL_DTYPES or x_hp.numel() == 0 or _misfit(amax, x_hp, block):
        return _reference(x_hp, element, scale, *block, amax, pad)  # nothing to do, or raises
    reason = _kernel_gap(element, scale, block) or triton_problem(x_hp.device, _capability(element))
    if reason is not None:
        warn_slow("scaled_cast", reason)
        return _reference(x_hp, element, scale, *block, amax, pad)

    formats = ELEMENT_FORMATS[element], SCALE_FORMATS[scale]
    row_major, multiples = not _is_column_major(x_hp), (pad[0], pad[1])
    one_matrix = x_hp.dim() == 2 or x_hp.shape[-2] % pad[0] == 0  # also for its padding
    if block == ROWWISE and row_major and amax is None and one_matrix:
        from aotrain.kernels.triton.scaled_cast import scaled_cast_rowwise

        rows = x_hp.reshape(x_hp.shape[:-1].numel(), x_hp.shape[-1])
        data, x_scale = scaled_cast_rowwise(rows, *formats, multiples if x_hp.dim() == 2 else (1, pad[1]))
    else:
        from aotrain.kernels.triton.scaled_cast_tiles import scaled_cast_tiles

        matrices = x_hp.reshape(-1, *x_hp.shape[-2:])
        if row_major:
            data, x_scale, _, _ = scaled_cast_tiles(matrices, block, None, *formats, amax, multiples)
        else:
            _, _, data, x_scale = scaled_cast_tiles(matrices.mT, None, block, *formats, amax, pad_t=multiples)
    shape = padded_shape(x_hp.shape, multiples)
    return data.view(shape), x_scale.view(scale_shape(shape, block))


def cast_kernel_gap(scaling: Scaling) -> str | None:
    """What keeps a cast to this format from being one fused kernel on a GPU; None when it is one."""
    if is_mx(scaling):
        return mx_cast_gap(scaling)
    return _kernel_gap(scaling.element.name, scaling.scale.name, scaling.block)


def _capability(element: str) -> tuple[int, int]:
    return MIN_CAPABILITY if element == "int8" else FLOAT8_CAPABILITY


def _misfit(amax: torch.Tensor | None, x: torch.Tensor, block: Block) -> bool:
    """Whether a given amax does not have a maximum for each scale of x, which the definition reports."""
    return amax is not None and (tuple(amax.shape) != scale_shape(x.shape, block) or amax.dtype != torch.float32)


def _is_column_major(x: torch.Tensor) -> bool:
    """Whether the elements of a column are contiguous and those of a row are not."""
    return x.stride(-2) == 1 != x.stride(-1)


def _kernel_gap(element: str, scale: str, block: Block) -> str | None:
    """What of this scaling the kernels do not do; None when they do all of it."""
    if block not in _KERNEL_BLOCKS:
        return f"there is no kernel for scale blocks of {block} yet"
    if element not in ("float8_e4m3fn", "float8_e5m2", "int8"):
        return f"there is no kernel for {element} yet"
    if scale not in ("float32", "float32_pow2"):
        return f"there is no kernel for {scale} scales yet"
    return None


def _fake(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    amax: torch.Tensor | None = None,
    pad: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = padded_shape(x_hp.shape, (pad[0], pad[1]))
    data = x_hp.new_empty(shape, dtype=ELEMENT_FORMATS[element].dtype)
    scales = scale_shape(shape, (block_rows, block_columns))
    return data, x_hp.new_empty(scales, dtype=SCALE_FORMATS[scale].dtype)


def _two_casts(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    element_t: str,
    scale_t: str,
    block_rows_t: int,
    block_columns_t: int,
    pad: Sequence[int] = UNPADDED,
    pad_t: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whatever implements `scaled_cast` on the device, once for both where a transposition has the same codes."""
    want, want_t = (element, scale, block_rows, block_columns), (element_t, scale_t, block_rows_t, block_columns_t)
    data, x_scale = torch.ops.aotrain.scaled_cast(x_hp, *want, None, pad)
    if want == want_t and want[2:] in _SYMMETRIC_BLOCKS and (pad[0], pad[1]) == (pad_t[1], pad_t[0]):
        return data, x_scale, *(x.mT.clone(memory_format=torch.contiguous_format) for x in (data, x_scale))
    return data, x_scale, *torch.ops.aotrain.scaled_cast(x_hp.mT, *want_t, None, pad_t)


def _cuda_both(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    element_t: str,
    scale_t: str,
    block_rows_t: int,
    block_columns_t: int,
    pad: Sequence[int] = UNPADDED,
    pad_t: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One kernel for both where there is one; where there is none, `scaled_cast` says so."""
    want, want_t = (element, scale, (block_rows, block_columns)), (element_t, scale_t, (block_rows_t, block_columns_t))
    one_pass = (
        *(want[:2] == want_t[:2], x_hp.dim() >= 2, x_hp.dtype in _KERNEL_DTYPES, x_hp.numel() > 0),
        *(_kernel_gap(*want) is None, _kernel_gap(*want_t) is None),
        triton_problem(x_hp.device, _capability(element)) is None,
    )
    if not all(one_pass):
        return _two_casts(x_hp, element, scale, *want[2], element_t, scale_t, *want_t[2], pad, pad_t)

    from aotrain.kernels.triton.scaled_cast_tiles import scaled_cast_tiles

    formats = ELEMENT_FORMATS[element], SCALE_FORMATS[scale]
    matrices = x_hp.reshape(-1, *x_hp.shape[-2:])
    pads = (pad[0], pad[1]), (pad_t[0], pad_t[1])
    if _is_column_major(x_hp):
        blocks = want_t[2], want[2]
        data_t, x_scale_t, data, x_scale = scaled_cast_tiles(matrices.mT, *blocks, *formats, None, *pads[::-1])
    else:
        data, x_scale, data_t, x_scale_t = scaled_cast_tiles(matrices, want[2], want_t[2], *formats, None, *pads)
    shape, shape_t = padded_shape(x_hp.shape, pads[0]), padded_shape(x_hp.mT.shape, pads[1])
    return (
        *(data.view(shape), x_scale.view(scale_shape(shape, want[2]))),
        *(data_t.view(shape_t), x_scale_t.view(scale_shape(shape_t, want_t[2]))),
    )


def _fake_both(
    x_hp: torch.Tensor,
    element: str,
    scale: str,
    block_rows: int,
    block_columns: int,
    element_t: str,
    scale_t: str,
    block_rows_t: int,
    block_columns_t: int,
    pad: Sequence[int] = UNPADDED,
    pad_t: Sequence[int] = UNPADDED,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        *_fake(x_hp, element, scale, block_rows, block_columns, None, pad),
        *_fake(x_hp.mT, element_t, scale_t, block_rows_t, block_columns_t, None, pad_t),
    )


LIBRARY.impl("scaled_cast", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("scaled_cast", _cpu, "CPU")
LIBRARY.impl("scaled_cast", _cuda, "CUDA")
torch.library.register_fake("aotrain::scaled_cast", _fake, lib=LIBRARY)
LIBRARY.impl("scaled_cast_both", _two_casts, "CompositeExplicitAutograd")
LIBRARY.impl("scaled_cast_both", _cuda_both, "CUDA")
torch.library.register_fake("aotrain::scaled_cast_both", _fake_both, lib=LIBRARY)
