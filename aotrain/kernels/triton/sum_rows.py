"""sum_rows on a GPU: one program sums a tile of tokens and columns over the choices of each token.

Bytes per element of the result, 16-bit: 2 * top_k read and 2 written. The sum stays in registers.
"""

import torch
import triton
import triton.language as tl

from aotrain.kernels.triton.token_permute import NUM_WARPS, select_tile


@triton.jit
def _sum_rows_kernel(
    y_ptr,  # [rows, N], rows contiguous
    slots_ptr,  # [T, TOP_K] int32, -1 for none
    weights_ptr,  # [T, TOP_K]; not read without weights
    out_ptr,  # [T, N] contiguous, y's dtype
    T,
    N,
    stride_y,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask, column_mask = tokens < T, (columns < N)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for choice in tl.static_range(TOP_K):
        slots = tl.load(slots_ptr + tokens * TOP_K + choice, mask=token_mask, other=-1).to(tl.int64)
        mask = (slots >= 0)[:, None] & column_mask
        rows = tl.load(y_ptr + slots[:, None] * stride_y + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            weights = tl.load(weights_ptr + tokens * TOP_K + choice, mask=token_mask, other=0.0).to(tl.float32)
            rows = rows * weights[:, None]
        total += rows
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * N + columns[None, :], out, mask=token_mask[:, None] & column_mask)


def sum_rows(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """As `kernels.sum_rows`; CPU tensors work under TRITON_INTERPRET=1."""
    num_tokens, num_columns = slots.shape[0], y.shape[1]
    out = torch.empty((num_tokens, num_columns), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    if y.stride(-1) != 1:
        y = y.contiguous()
    block_t, block_n = select_tile(num_columns, 4)  # the sum is float32
    with torch.cuda.device_of(y):
        _sum_rows_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(num_columns, block_n))](
            *(y, slots.contiguous(), y if weights is None else weights.contiguous(), out),
            *(num_tokens, num_columns, y.stride(0)),
            TOP_K=slots.shape[1],
            WEIGHTED=weights is not None,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out
