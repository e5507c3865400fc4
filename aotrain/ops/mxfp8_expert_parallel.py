"""The four steps of MXFP8 expert parallelism under the names of torchao's `moe_training.ep`, on plain tensors.

    rows    = a2a_dispatch_mxfp8_fwd_hp_bwd(x, output_splits, input_splits)
    shape, rows, indices, sizes, offsets = permute_mxfp8_fwd_hp_bwd(rows, counts, ep_degree, num_local_experts)
    y       = grouped products of rows
    y       = unpermute_hp_fwd_mxfp8_bwd(y, indices, shape)
    out     = a2a_combine_hp_fwd_mxfp8_bwd(y, input_splits, output_splits)

Two things differ. Where torchao hands out an MXTensor, these hand out `QuantizedRows`: codes, scales and a handle for
gradients; `dequantize_rows` makes values of them. And the gradient that leaves the backward of the last two steps is a
plain tensor whose rows are MXFP8 values, which quantizing again along the same dimension does not change.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from aotrain.formats import SCALE_FORMATS, Scaling
from aotrain.ops.permute import token_permutation, unpermute_indexed
from aotrain.ops.quantized_all_to_all import (
    MXFP8_ROWS,
    QuantizedRows,
    all_to_all_combine,
    all_to_all_dispatch_quantized,
    permute_quantized,
)

if TYPE_CHECKING:
    from aotrain.ops.quantized_all_to_all import Group


def a2a_dispatch_mxfp8_fwd_hp_bwd(
    input: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group_name: "Group" = None,
    scaling_mode: str = "rceil",
    block_size: int = 32,
) -> QuantizedRows:
    """Dispatch [rows, K] with an MXFP8 payload; the gradient comes back in high precision."""
    scaling = _mxfp8(scaling_mode, block_size)
    return all_to_all_dispatch_quantized(input, output_splits, input_splits, group_name, forward=scaling)


def permute_mxfp8_fwd_hp_bwd(
    rows: QuantizedRows,
    num_tokens_per_expert: torch.Tensor,
    ep_degree: int,
    num_local_experts: int,
    group_size_multiple_of: int = 32,
) -> tuple[torch.Size, QuantizedRows, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`permute_and_pad` of quantized rows: (shape with one more row, rows, indices, padded sizes, end offsets)."""
    num_rows, num_columns = rows.q.data.shape
    groups = (num_tokens_per_expert, num_local_experts, ep_degree, group_size_multiple_of)
    permutation = token_permutation(num_rows, *groups, min_group_rows=group_size_multiple_of)
    permuted = permute_quantized(rows, permutation)
    shape = torch.Size((num_rows + 1, num_columns))
    return shape, permuted, permutation.indices, permutation.sizes, permutation.offsets


def unpermute_hp_fwd_mxfp8_bwd(
    input: torch.Tensor, permuted_indices: torch.Tensor, padded_shape: Sequence[int]
) -> torch.Tensor:
    """Undo the permutation and drop padding: [padded_shape[0] - 1, K]. The gradient is a copy of rows."""
    return unpermute_indexed(input, permuted_indices, padded_shape[0] - 1)


def a2a_combine_hp_fwd_mxfp8_bwd(
    input: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group_name: "Group" = None,
    scaling_mode: str = "rceil",
    block_size: int = 32,
    mxfp8_bwd: bool = True,
) -> torch.Tensor:
    """Combine [rows, K] in high precision; the gradient comes back with an MXFP8 payload, if `mxfp8_bwd`."""
    backward = _mxfp8(scaling_mode, block_size) if mxfp8_bwd else None
    return all_to_all_combine(input, output_splits, input_splits, group_name, backward=backward)


def _mxfp8(scaling_mode: str, block_size: int) -> Scaling:
    name = f"e8m0_{scaling_mode.lower()}"
    if block_size != 32 or name not in SCALE_FORMATS:
        modes = [mode.removeprefix("e8m0_") for mode in SCALE_FORMATS if mode.startswith("e8m0_")]
        raise ValueError(f"MXFP8 got scaling_mode {scaling_mode!r}, block_size {block_size}; want one of {modes}, 32.")
    return replace(MXFP8_ROWS, scale=SCALE_FORMATS[name])
