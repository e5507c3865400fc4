"""nvfp4_cast: a matrix as operands of NVFP4 products, as it is, transposed, or both; `formats` bit for bit.

An operand has the contracted dimension last and padded with zeros to a multiple of 32, which is what products take:
pairs of codes, blocks of 16 and vectors of scales then come out whole, and so do the eight elements that share a random
counter. With C columns of the source and P = ceil(C / 32) * 32:

    data          uint8 [R, P / 2]            two e2m1 codes per byte (formats.packing)
    scale         float8_e4m3fn [R, P / 16]   or in tiles of 128 x 4 (formats.scale_layout), one dimension
    global_scale  float32 [1, 1]

Blocks are 1 x 16 of the operand, or 16 x 16 with each scale repeated for its 16 rows. The transposition may go through
the random Hadamard transform along its columns first; its global scale is then that of the transformed matrix. With a
seed, rounding is stochastic: element (r, c) of the padded operand takes 16 bits of index r * P + c under the key
`data_key(2 * seed, x)`, and that of the transposition under `data_key(2 * seed + 1, x)`.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_16X16,
    blocked_size,
    data_key,
    hadamard_transform,
    pack_float4,
    philox_bits16,
    quantize_nvfp4,
    to_blocked,
)
from aotrain.formats.hadamard import HADAMARD_SIZE
from aotrain.formats.scaling import Block
from aotrain.kernels import _nvfp4_cpu
from aotrain.kernels._dispatch import MIN_CAPABILITY, triton_problem, warn_slow
from aotrain.kernels._library import LIBRARY

# What the contracted dimension of an operand is padded to: 16 bytes of codes.
ALIGNMENT = 32
BLOCK_SIZE = 16

LIBRARY.define(
    "nvfp4_cast(Tensor x_hp, int block_rows, bool as_is, bool transposed, int[] signs, int? seed, bool blocked)"
    " -> (Tensor data, Tensor scale, Tensor global_scale, Tensor data_t, Tensor scale_t, Tensor global_scale_t)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


class Nvfp4Operand(NamedTuple):
    """One operand of an NVFP4 product; shapes in the module's docstring."""

    data: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor


def nvfp4_cast(
    x_hp: torch.Tensor,
    *,
    block: Block = BLOCKWISE_1X16,
    transposed: bool = False,
    signs: Sequence[int] = (),
    seed: int | None = None,
    blocked: bool = False,
) -> Nvfp4Operand:
    """Quantize a matrix, or its transposition.

    Args:
        x_hp: [rows, columns], float32, bfloat16 or float16, any strides.
        block: (1, 16), or (16, 16), whose codes are the same for the transposition.
        transposed: quantize x.t(), [columns, rows], instead.
        signs: 16 of 1 and -1: transform the transposition, padded, along its columns first.
        seed: of stochastic rounding; to nearest if None.
        blocked: whether scales come in tiles of 128 x 4.

    Raises:
        ValueError: not a matrix; signs without `transposed` or with blocks of 16 x 16, or not 16 of them.
        TypeError: another dtype.
    """
    if signs and not transposed:
        raise ValueError("nvfp4_cast got signs for a matrix as it is; only the transposition is transformed.")
    _check(x_hp, block, signs)
    outputs = torch.ops.aotrain.nvfp4_cast(x_hp, block[0], not transposed, transposed, signs, seed, blocked)
    return Nvfp4Operand(*(outputs[3:] if transposed else outputs[:3]))


def nvfp4_cast_both(
    x_hp: torch.Tensor,
    *,
    block: Block = BLOCKWISE_1X16,
    signs: Sequence[int] = (),
    seed: int | None = None,
    blocked: bool = False,
) -> tuple[Nvfp4Operand, Nvfp4Operand]:
    """`nvfp4_cast` of x and of its transposition, which alone is transformed; maxima of both come from one read of x.

    Args and errors as there.
    """
    _check(x_hp, block, signs)
    outputs = torch.ops.aotrain.nvfp4_cast(x_hp, block[0], True, True, signs, seed, blocked)
    return Nvfp4Operand(*outputs[:3]), Nvfp4Operand(*outputs[3:])


def _check(x_hp: torch.Tensor, block: Block, signs: Sequence[int]) -> None:
    if x_hp.dim() != 2:
        raise ValueError(f"nvfp4_cast got shape {tuple(x_hp.shape)}; want a matrix: flatten leading dimensions.")
    if x_hp.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"nvfp4_cast got {x_hp.dtype}; want float32, bfloat16 or float16: cast the tensor first.")
    if block not in (BLOCKWISE_1X16, BLOCKWISE_16X16) or (signs and block != BLOCKWISE_1X16):
        raise ValueError(
            f"nvfp4_cast got blocks of {block} {'with' if signs else 'without'} signs; want {BLOCKWISE_1X16}, or "
            f"{BLOCKWISE_16X16} without signs."
        )
    if signs and (len(signs) != HADAMARD_SIZE or any(sign not in (1, -1) for sign in signs)):
        raise ValueError(f"nvfp4_cast got signs {tuple(signs)}; want {HADAMARD_SIZE} of 1 and -1.")


def padded_columns(columns: int) -> int:
    """The size that a contracted dimension is padded to."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


# An operand as it is and one transposed; what was not wanted has no elements.
Outputs = tuple[torch.Tensor, ...]


def _reference(
    x_hp: torch.Tensor,
    block_rows: int,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
    blocked: bool,
) -> Outputs:
    operands: list[torch.Tensor] = []
    for stream, (wanted, x) in enumerate(((as_is, x_hp), (transposed, x_hp.t()))):
        if not wanted:
            operands += _left_out(x_hp)
            continue
        x = torch.nn.functional.pad(x, (0, padded_columns(x.shape[1]) - x.shape[1]))
        if stream == 1 and signs and x.numel() > 0:
            x = hadamard_transform(x, torch.tensor(signs, dtype=torch.float32, device=x.device))
        key = None if seed is None else data_key(2 * seed + stream, x_hp)
        operands += _reference_operand(x, (block_rows, BLOCK_SIZE), key, blocked)
    return tuple(operands)


def _reference_operand(
    x: torch.Tensor, block: Block, key: torch.Tensor | None, blocked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = None
    if key is not None and x.numel() > 0:
        noise = philox_bits16(key, torch.arange(x.numel(), device=x.device)).view(x.shape)
    q = quantize_nvfp4(x, block=block, noise=noise)
    scale = q.scale
    if block == BLOCKWISE_16X16:
        scale = scale.view(torch.uint8).repeat_interleave(BLOCK_SIZE, dim=0)[: x.shape[0]].view(scale.dtype)
    return pack_float4(q.data), to_blocked(scale) if blocked else scale, q.global_scale


def _cpu(
    x_hp: torch.Tensor,
    block_rows: int,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
    blocked: bool,
) -> Outputs:
    if x_hp.numel() == 0 or _nvfp4_cpu.library()[0] is None:
        return _reference(x_hp, block_rows, as_is, transposed, signs, seed, blocked)
    operands: list[torch.Tensor] = []
    for stream, (wanted, x) in enumerate(((as_is, x_hp), (transposed, x_hp.t()))):
        if not wanted:
            operands += _left_out(x_hp)
            continue
        data, scale, global_scale = _allocate(x, *x.shape, blocked=False)
        stream_seed = None if seed is None else 2 * seed + stream
        _nvfp4_cpu.cast_operand(x, block_rows, signs if stream else (), stream_seed, (data, scale, global_scale))
        operands += (data, to_blocked(scale) if blocked else scale, global_scale)
    return tuple(operands)


def _cuda(
    x_hp: torch.Tensor,
    block_rows: int,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
    blocked: bool,
) -> Outputs:
    """The Triton kernels. Tests call it with CPU tensors under Triton's interpreter."""
    reason = triton_problem(x_hp.device, MIN_CAPABILITY)
    if reason is not None:
        warn_slow("nvfp4_cast", reason)
    if reason is not None or x_hp.numel() == 0:
        return _reference(x_hp, block_rows, as_is, transposed, signs, seed, blocked)
    from aotrain.kernels.triton.nvfp4_cast import cast_operands

    rows, columns = x_hp.shape
    operands = (
        _allocate(x_hp, rows, columns, blocked) if as_is else None,
        _allocate(x_hp, columns, rows, blocked) if transposed else None,
    )
    cast_operands(x_hp, block_rows, *operands, signs, seed)
    return tuple(part for operand in operands for part in operand or _left_out(x_hp))


def _left_out(x_hp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x_hp.new_empty(0, dtype=torch.uint8),
        x_hp.new_empty(0, dtype=torch.float8_e4m3fn),
        x_hp.new_empty(0, dtype=torch.float32),
    )


def _allocate(
    x_hp: torch.Tensor, rows: int, columns: int, blocked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for an operand of `columns` unpadded columns; tiles of scales are zeros, since tails are never written."""
    padded = padded_columns(columns)
    if blocked:
        scale = x_hp.new_zeros(blocked_size(rows, padded // BLOCK_SIZE), dtype=torch.uint8).view(torch.float8_e4m3fn)
    else:
        scale = x_hp.new_empty((rows, padded // BLOCK_SIZE), dtype=torch.float8_e4m3fn)
    return (
        x_hp.new_empty((rows, padded // 2), dtype=torch.uint8),
        scale,
        x_hp.new_empty((1, 1), dtype=torch.float32),
    )


def _fake(
    x_hp: torch.Tensor,
    block_rows: int,
    as_is: bool,
    transposed: bool,
    signs: Sequence[int],
    seed: int | None,
    blocked: bool,
) -> Outputs:
    rows, columns = x_hp.shape
    return (
        *(_allocate(x_hp, rows, columns, blocked) if as_is else _left_out(x_hp)),
        *(_allocate(x_hp, columns, rows, blocked) if transposed else _left_out(x_hp)),
    )


LIBRARY.impl("nvfp4_cast", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("nvfp4_cast", _cpu, "CPU")
LIBRARY.impl("nvfp4_cast", _cuda, "CUDA")
torch.library.register_fake("aotrain::nvfp4_cast", _fake, lib=LIBRARY)
