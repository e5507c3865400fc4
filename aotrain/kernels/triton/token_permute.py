"""token_permute on a GPU: indices of the expert-major order from counts, and a gather of rows by indices.

`_expert_major_indices_kernel`: one program per (source rank, local expert). Each reads the whole table of counts (a few
KB, in cache after the first) and finds by sums over it where its rows lie before and after; it then writes their
numbers into both index lists. The programs of the last rank also write the padding of their expert, the very last one
all that lies behind the last group, so every entry is written exactly once and nothing is filled in advance.

`_gather_rows_kernel`: one program copies a tile of rows and columns. Bytes per byte of the result: one read (none for
padding) and one written. It serves permuting, unpermuting and both gradients.
"""

import torch
import triton
import triton.language as tl

# Entries written per step of a program's loops: 8 per thread of 4 warps.
INDEX_BLOCK = 1024
# Bytes of a tile of rows: four 16-byte accesses per thread of 4 warps. Not measured on a GPU yet.
TILE_BYTES = 8192
MAX_COLUMN_BYTES = 4096
NUM_WARPS = 4


@triton.jit
def _expert_major_indices_kernel(
    counts_ptr,  # [NUM_RANKS, NUM_EXPERTS] int32 or int64
    indices_ptr,  # [num_permuted] int32
    inverse_ptr,  # [num_rows] int32
    sizes_ptr,  # [NUM_EXPERTS] int32
    offsets_ptr,  # [NUM_EXPERTS] int32
    num_rows,
    num_permuted,
    alignment,
    min_rows,
    NUM_RANKS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rank = tl.program_id(0) // NUM_EXPERTS
    expert = tl.program_id(0) % NUM_EXPERTS
    ranks = tl.arange(0, BLOCK_RANKS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    inside = (ranks < NUM_RANKS) & (experts < NUM_EXPERTS)
    counts = tl.load(counts_ptr + ranks * NUM_EXPERTS + experts, mask=inside, other=0).to(tl.int32)
    sizes = (tl.sum(counts, axis=0) + alignment - 1) // alignment * alignment
    of_expert = tl.arange(0, BLOCK_EXPERTS)
    sizes = tl.where(of_expert < NUM_EXPERTS, tl.maximum(sizes, min_rows), 0)

    before = (ranks < rank) | ((ranks == rank) & (experts < expert))
    mine = experts == expert
    count = tl.sum(tl.sum(tl.where(mine & (ranks == rank), counts, 0), axis=1), axis=0)
    source = tl.sum(tl.sum(tl.where(before, counts, 0), axis=1), axis=0)
    group_start = tl.sum(tl.where(of_expert < expert, sizes, 0), axis=0)
    group_end = group_start + tl.sum(tl.where(of_expert == expert, sizes, 0), axis=0)
    target = group_start + tl.sum(tl.sum(tl.where(mine & (ranks < rank), counts, 0), axis=1), axis=0)

    lanes = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        step = start + lanes
        from_row, to_row = source + step, target + step
        # Counts that do not fit the bounds lose rows, and never write beyond.
        has_source, has_target = from_row < num_rows, to_row < num_permuted
        tl.store(indices_ptr + to_row, tl.where(has_source, from_row, -1), mask=(step < count) & has_target)
        tl.store(inverse_ptr + from_row, tl.where(has_target, to_row, -1), mask=(step < count) & has_source)

    if rank == 0:
        tl.store(sizes_ptr + expert, group_end - group_start)
        tl.store(offsets_ptr + expert, group_end)
    if rank == NUM_RANKS - 1:
        padding_end = group_end
        if expert == NUM_EXPERTS - 1:
            padding_end = tl.maximum(num_permuted, group_end)
            for start in range(source + count, num_rows, BLOCK):
                tl.store(inverse_ptr + start + lanes, -1, mask=start + lanes < num_rows)
        for start in range(target + count, padding_end, BLOCK):
            row = start + lanes
            tl.store(indices_ptr + row, -1, mask=(row < padding_end) & (row < num_permuted))


@triton.jit
def _gather_rows_kernel(
    x_ptr,  # [rows, K] integers, rows contiguous
    indices_ptr,  # [M] int32, -1 for a row of zeros
    y_ptr,  # [M, K] contiguous
    M,
    K,
    stride_m,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    sources = tl.load(indices_ptr + rows, mask=rows < M, other=-1).to(tl.int64)
    x = tl.load(
        x_ptr + sources[:, None] * stride_m + columns[None, :],
        mask=(sources >= 0)[:, None] & (columns < K)[None, :],
        other=0,
    )
    tl.store(y_ptr + rows[:, None] * K + columns[None, :], x, mask=(rows < M)[:, None] & (columns < K)[None, :])


def expert_major_indices(
    counts: torch.Tensor, num_experts: int, alignment: int, min_rows: int, num_rows: int, num_permuted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.token_permute.expert_major_permutation`; CPU tensors work under TRITON_INTERPRET=1."""
    lengths = (num_permuted, num_rows, num_experts, num_experts)
    indices, inverse, sizes, offsets = (
        torch.empty(length, dtype=torch.int32, device=counts.device) for length in lengths
    )
    num_ranks = counts.numel() // num_experts
    with torch.cuda.device_of(counts):
        _expert_major_indices_kernel[(counts.numel(),)](
            counts.contiguous(),
            *(indices, inverse, sizes, offsets),
            *(num_rows, num_permuted, alignment, min_rows),
            **index_constants(num_ranks, num_experts),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return indices, inverse, sizes, offsets


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """As `kernels.token_permute.gather_rows`, of integers; CPU tensors work under TRITON_INTERPRET=1."""
    num_rows, num_columns = indices.shape[0], x.shape[1]
    y = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_m, block_k = select_tile(num_columns, x.element_size())
    with torch.cuda.device_of(x):
        _gather_rows_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_columns, block_k))](
            *(x, indices, y),
            *(num_rows, num_columns, x.stride(0)),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return y


def index_constants(num_ranks: int, num_experts: int) -> dict[str, int]:
    """Compile-time constants of the kernel of indices."""
    return {
        "NUM_RANKS": num_ranks,
        "NUM_EXPERTS": num_experts,
        "BLOCK_RANKS": _power_of_two(num_ranks),
        "BLOCK_EXPERTS": _power_of_two(num_experts),
        "BLOCK": INDEX_BLOCK,
    }


def select_tile(num_columns: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of a tile of TILE_BYTES; of a quarter where vectors do not fit, for its registers."""
    block_k = min(_power_of_two(num_columns), MAX_COLUMN_BYTES // element_size)
    tile_bytes = TILE_BYTES if num_columns % 16 == 0 else TILE_BYTES // 4
    return max(1, tile_bytes // (block_k * element_size)), block_k


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` >= 1."""
    return 1 << (size - 1).bit_length()
