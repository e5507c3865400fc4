"""nvfp4_grouped_cast: the rows of a matrix that is sorted by group, and each group's transposition, as NVFP4 operands.

Every group has the operands that `nvfp4_cast` gives it alone: global scale, transform, noise and all. With E groups in
x [M, K] (`aotrain.kernels.groups`, padded to multiples of 32 rows), P = ceil(K / 32) * 32 and R = `padded_rows`:

    as it is     data uint8 [M, P / 2], scale [M, P / 16]     group e is data[start:end]
    transposed   data uint8 [K, R / 2], scale [K, R / 16]     group e is data[:, padded start / 2 : padded end / 2]
    either       global_scale float32 [E]

Noise of group e follows from the seed and the values of its own rows, and element (r, c) of its operand, which has C
columns with padding, takes 16 bits of index r * C + c: what other groups hold, or how many there are, changes nothing.

What belongs to no group, rows after the last one and columns of empty ones, has codes of zero and the smallest scale.

On CPU this is a loop over groups. On a GPU nothing waits for the offsets: maxima and keys of all groups are gathered by
integer atomics.
"""

from collections.abc import Sequence

import torch

from aotrain.formats import BLOCKWISE_1X16, FLOAT8_E4M3, hadamard_transform, pack_float4, philox_u32, quantize_nvfp4
from aotrain.formats.nvfp4 import nvfp4_global_scale
from aotrain.formats.random import seed_word
from aotrain.formats.scaling import Block
from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY
from aotrain.kernels.grouped_cast import pad_groups
from aotrain.kernels.groups import GroupLayout, group_bounds, padded_rows, row_groups
from aotrain.kernels.nvfp4_cast import (
    ALIGNMENT,
    BLOCK_SIZE,
    Nvfp4Operand,
    Outputs,
    nvfp4_cast,
    padded_columns,
)

LIBRARY.define(
    "nvfp4_grouped_cast(Tensor x_hp, Tensor ends, Tensor padded_ends, bool as_is, bool transposed, int[] signs,"
    " int? seed) -> (Tensor data, Tensor scale, Tensor global_scale, Tensor data_t, Tensor scale_t,"
    " Tensor global_scale_t)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIBRARY.define(
    "nvfp4_batched_cast(Tensor x_hp, int block_rows) -> (Tensor data, Tensor scale, Tensor global_scale)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

# The code of the smallest e4m3, which the scales of zeros are.
_SMALLEST_SCALE = 1


def nvfp4_grouped_cast(
    x_hp: torch.Tensor,
    layout: GroupLayout,
    *,
    as_is: bool = True,
    transposed: bool = False,
    signs: Sequence[int] = (),
    seed: int | None = None,
) -> tuple[Nvfp4Operand | None, Nvfp4Operand | None]:
    """Quantize the rows of every group, their transpositions, or both.

    Args:
        x_hp: [M, K], float32, bfloat16 or float16, any strides.
        layout: of its groups, with `align` 32.
        as_is: whether rows are wanted.
        transposed: whether transpositions are.
        signs: 16 of 1 and -1: transform the transpositions, padded, along their columns first.
        seed: of stochastic rounding; to nearest if None.

    Returns:
        The rows and the transpositions, None for what was not wanted.

    Raises:
        ValueError: groups that are aligned to something else.
    """
    if layout.align != ALIGNMENT:
        raise ValueError(f"nvfp4_grouped_cast got groups of multiples of {layout.align} rows; want {ALIGNMENT}.")
    outputs = torch.ops.aotrain.nvfp4_grouped_cast(
        x_hp, layout.ends, layout.padded_ends, as_is, transposed, signs, seed
    )
    return (Nvfp4Operand(*outputs[:3]) if as_is else None, Nvfp4Operand(*outputs[3:]) if transposed else None)


def nvfp4_batched_cast(x_hp: torch.Tensor, block: Block = BLOCKWISE_1X16) -> Nvfp4Operand:
    """`nvfp4_cast` of every matrix of [E, R, C], to nearest: data [E, R, P / 2], scale [E, R, P / 16], global [E]."""
    return Nvfp4Operand(*torch.ops.aotrain.nvfp4_batched_cast(x_hp, block[0]))


def _reference(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
) -> Outputs:
    outputs = _zeros(x_hp, ends, as_is, transposed)
    data, scale, level, data_t, scale_t, level_t = outputs
    bounds = group_bounds(ends, x_hp.shape[0])
    for group, (start, end) in enumerate(bounds):
        first = 0 if group == 0 else int(padded_ends[group - 1])
        if end == start:
            continue
        arguments = (1, as_is, transposed, signs, seed, False)
        q = torch.ops.aotrain.nvfp4_cast(x_hp[start:end], *arguments)
        if as_is:
            data[start:end], scale[start:end], level[group] = q[0], q[1], q[2][0, 0]
        if transposed:
            last = first + padded_columns(end - start)
            data_t[:, first // 2 : last // 2], level_t[group] = q[3], q[5][0, 0]
            scale_t[:, first // BLOCK_SIZE : last // BLOCK_SIZE] = q[4]
    return outputs


def _cuda(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
) -> Outputs:
    """The Triton kernels. Tests call it with CPU tensors under Triton's interpreter."""
    if x_hp.numel() == 0 or ends.numel() == 0:
        return _zeros(x_hp, ends, as_is, transposed)
    reason = triton_problem(x_hp.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("nvfp4_grouped_cast", reason)
        return _without_kernel(x_hp, ends, padded_ends, as_is, transposed, signs, seed)
    from aotrain.kernels.triton.nvfp4_grouped_cast import cast_groups

    outputs = _fake(x_hp, ends, padded_ends, as_is, transposed, signs, seed)
    operands = (outputs[:3] if as_is else None, outputs[3:] if transposed else None)
    cast_groups(x_hp, ends, padded_ends, *operands, signs, seed)
    return outputs


def _without_kernel(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
) -> Outputs:
    """The same bits in plain PyTorch, without waiting for the offsets either. Not for tensors without elements."""
    num_groups, rows = ends.shape[0], x_hp.shape[0]
    group = row_groups(ends, rows)
    x = x_hp.float().masked_fill((group == num_groups).unsqueeze(1), 0)
    checksums = None
    if seed is not None:  # one for the rows of no group, too
        sums = x.view(torch.int32).sum(1, dtype=torch.int64)
        checksums = sums.new_zeros(num_groups + 1).index_add_(0, group, sums)
    left_out = _left_out(x_hp)
    outputs = left_out
    if as_is:
        key = None if checksums is None or seed is None else checksums ^ seed_word(2 * seed)
        outputs = _cast_rows(x, ends, group, key)
    if not transposed:
        return *outputs, *left_out
    key = None if checksums is None or seed is None else checksums ^ seed_word(2 * seed + 1)
    return *outputs, *_cast_columns(pad_groups(x, ends, padded_ends, ALIGNMENT), ends, padded_ends, signs, key)


def _cast_rows(x: torch.Tensor, ends: torch.Tensor, group: torch.Tensor, key: torch.Tensor | None) -> Outputs:
    """Rows of x [M, K], float32 and zero in group E; `key` [E + 1] is that of the noise."""
    x = torch.nn.functional.pad(x, (0, padded_columns(x.shape[1]) - x.shape[1]))
    level = _global_scales(x.abs().view(torch.int32).amax(1), group, ends.shape[0])
    noise = None
    if key is not None:
        starts = torch.cat([ends.new_zeros(1), ends]).long()
        row = torch.arange(x.shape[0], device=x.device) - starts[group]
        eight = torch.arange(x.shape[1] // 8, device=x.device)
        noise = _noise(key[group].unsqueeze(1), row.unsqueeze(1) * (x.shape[1] // 8) + eight)
    return *_quantize(x, level[group].unsqueeze(1), noise), level[:-1]


def _cast_columns(
    padded: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    signs: Sequence[int],
    key: torch.Tensor | None,
) -> Outputs:
    """The transposition of `pad_groups`' [R, K], which is float32."""
    x = padded.t()
    if signs:
        x = hadamard_transform(x, torch.tensor(signs, dtype=torch.float32, device=x.device))
    num_groups, columns = ends.shape[0], x.shape[1]
    group = row_groups(padded_ends, columns)
    zero = ends.new_zeros(1)
    is_empty = torch.cat([ends.diff(prepend=zero) == 0, zero == 0])
    x = x.masked_fill(is_empty[group], 0)  # transformed zeros may have a sign
    level = _global_scales(x.abs().contiguous().view(torch.int32).amax(0), group, num_groups)
    noise = None
    if key is not None:
        starts = torch.cat([zero, padded_ends]).long()
        sizes = torch.cat([padded_ends.diff(prepend=zero), zero]).long()
        eight = group[::8]
        column = torch.arange(0, columns, 8, device=x.device) - starts[eight]
        row = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        noise = _noise(key[eight], (row * sizes[eight] + column) >> 3)
    return *_quantize(x, level[group[::BLOCK_SIZE]], noise), level[:-1]


def _global_scales(amax_bits: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[E + 1] from magnitudes as int32 bits, whose order is that of the numbers, with NaN the largest."""
    bits = amax_bits.new_zeros(num_groups + 1).scatter_reduce_(0, group, amax_bits, "amax")
    return nvfp4_global_scale(bits.view(torch.float32))


def _quantize(x: torch.Tensor, level: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of x [R, C] with a global scale per block of 16, which broadcasts to [R, C / 16]."""
    blocks = x.unflatten(1, (-1, 1, BLOCK_SIZE))  # a matrix of one row each
    levels = level.expand(blocks.shape[:2])[..., None, None]
    q = quantize_nvfp4(blocks, global_scale=levels, noise=None if noise is None else noise.view(blocks.shape))
    return pack_float4(q.data.reshape(x.shape)), q.scale.flatten(1)


def _noise(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """`philox_bits16` of the indices 8 * counter + 0..7: [R, 8 * C] from counters [R, C], under a key per counter."""
    words = philox_u32(key, counter)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)


def _zeros(x_hp: torch.Tensor, ends: torch.Tensor, as_is: bool, transposed: bool) -> Outputs:
    """Operands of groups without elements."""
    outputs = _fake(x_hp, ends, ends, as_is, transposed, (), None)
    for number, part in enumerate(outputs):
        if number % 3 == 2:
            part.copy_(nvfp4_global_scale(part.new_zeros(())))
        else:
            part.view(torch.uint8).fill_(_SMALLEST_SCALE if number % 3 else 0)
    return outputs


def _fake(
    x_hp: torch.Tensor,
    ends: torch.Tensor,
    padded_ends: torch.Tensor,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
) -> Outputs:
    rows, columns = x_hp.shape
    padded = padded_rows(rows, ends.shape[0], ALIGNMENT)
    shapes = ((rows, padded_columns(columns)) if as_is else None, (columns, padded) if transposed else None)
    return tuple(
        part
        for shape in shapes
        for part in (_left_out(x_hp) if shape is None else _allocate(x_hp, shape, ends.shape[0]))
    )


def _allocate(x_hp: torch.Tensor, shape: tuple[int, ...], num_groups: int) -> Outputs:
    """Memory for operands of these dimensions, the last one padded."""
    *rows, columns = shape
    return (
        x_hp.new_empty((*rows, columns // 2), dtype=torch.uint8),
        x_hp.new_empty((*rows, columns // BLOCK_SIZE), dtype=FLOAT8_E4M3.dtype),
        x_hp.new_empty(num_groups, dtype=torch.float32),
    )


def _left_out(x_hp: torch.Tensor) -> Outputs:
    return tuple(part.flatten() for part in _allocate(x_hp, (0, 0), 0))


def _batched(x_hp: torch.Tensor, block_rows: int) -> Outputs:
    """Whatever implements `nvfp4_cast` on the device, one matrix after another; nothing is waited for."""
    outputs = _fake_batched(x_hp, block_rows)
    for number, matrix in enumerate(x_hp):
        q = nvfp4_cast(matrix, block=(block_rows, BLOCK_SIZE))
        for whole, part in zip(outputs, (q.data, q.scale, q.global_scale.view(())), strict=True):
            whole[number] = part
    return outputs


def _fake_batched(x_hp: torch.Tensor, block_rows: int) -> Outputs:
    matrices, rows, columns = x_hp.shape
    return _allocate(x_hp, (matrices, rows, padded_columns(columns)), matrices)


LIBRARY.impl("nvfp4_grouped_cast", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("nvfp4_grouped_cast", _cuda, "CUDA")
torch.library.register_fake("aotrain::nvfp4_grouped_cast", _fake, lib=LIBRARY)
LIBRARY.impl("nvfp4_batched_cast", _batched, "CompositeExplicitAutograd")
torch.library.register_fake("aotrain::nvfp4_batched_cast", _fake_batched, lib=LIBRARY)
