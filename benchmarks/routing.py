"""What a rank does around the all-to-all of a mixture-of-experts layer, beside the plain torch of it.

- "indices": the expert-major order and its inverse from the counts.
- "permute": rows received in bfloat16, sorted by local expert.
- "permute-codes": the same rows as MXFP8 codes, and their scales.
- "pack": rows quantized to MXFP8 and laid out for one collective.
- "combine": the weighted sum of each token's outputs.
"""

from collections.abc import Iterator

import torch

from aotrain.formats import quantize
from aotrain.kernels import expert_major_permutation, gather_rows, scaled_cast, sum_rows
from aotrain.ops.packed_rows import pack_rows, unpack_rows
from aotrain.ops.quantized_all_to_all import MXFP8_ROWS
from aotrain.testing import assert_bitwise_equal, sqnr
from benchmarks.case import Case

# Tokens of a rank, choices of a token, columns, ranks, experts of a rank: DeepSeek-V3 and Qwen3-30B-A3B over 8 ranks.
GPU_SHAPES = ((4096, 8, 7168, 8, 32), (8192, 8, 2048, 8, 16))
CPU_SHAPES = ((256, 4, 1024, 4, 4),)
# Sums in bfloat16 are torch's; ours are float32 and rounded once. Measured at least 50 over seeds 0 to 2.
COMBINE_SQNR_DB = 40.0


def routing_cases(device: torch.device) -> Iterator[Case]:
    """Balanced routing: every rank receives as many rows as it sends."""
    for tokens, top_k, columns, ranks, experts in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        rows = tokens * top_k
        counts = torch.full((ranks * experts,), rows // (ranks * experts), device=device)
        x = torch.randn(rows, columns, device=device).bfloat16()
        yield from _permuting(x, counts, experts)
        yield from _combining(x, tokens, top_k)


def _permuting(x: torch.Tensor, counts: torch.Tensor, experts: int) -> Iterator[Case]:
    (rows, columns), shape = x.shape, f"{x.shape[0]}x{x.shape[1]}"

    def indices() -> object:
        return expert_major_permutation(counts, experts, num_rows=rows, num_permuted=rows)

    def check_indices() -> None:
        assert_bitwise_equal(gather_rows(gather_rows(x, permutation.indices), permutation.inverse), x)

    permutation = expert_major_permutation(counts, experts, num_rows=rows, num_permuted=rows)
    wide = permutation.indices.long()

    def check_permute() -> None:
        assert_bitwise_equal(gather_rows(x, permutation.indices), x[wide])

    q = quantize(x, MXFP8_ROWS)
    received = unpack_rows(pack_rows(q), columns, MXFP8_ROWS)

    def permute_codes() -> tuple[torch.Tensor, torch.Tensor]:
        return gather_rows(received.data, permutation.indices), gather_rows(received.scale, permutation.indices)

    def check_codes() -> None:
        for got, want in zip(permute_codes(), q[:2], strict=True):
            assert_bitwise_equal(got.view(torch.uint8), want.view(torch.uint8)[wide])

    def check_pack() -> None:
        assert_bitwise_equal(pack_rows(scaled_cast(x, MXFP8_ROWS)), pack_rows(q))

    elements, scales = x.numel(), q.scale.numel()
    cases = [
        ("indices", indices, check_indices, 4 * 2 * rows + 8 * counts.numel()),
        ("permute", lambda: gather_rows(x, permutation.indices), check_permute, 4 * elements + 4 * rows),
        ("permute-torch", lambda: x[wide], check_permute, 4 * elements + 8 * rows),
        ("permute-codes", permute_codes, check_codes, 2 * (elements + scales) + 4 * rows),
        ("pack", lambda: pack_rows(scaled_cast(x, MXFP8_ROWS)), check_pack, 3 * elements + scales),
    ]
    for name, run, check, moved in cases:
        yield Case(name=f"routing-{name}", shape=shape, run=run, check=check, bytes_moved=moved)


def _combining(y: torch.Tensor, tokens: int, top_k: int) -> Iterator[Case]:
    slots = torch.randperm(y.shape[0], device=y.device).int().view(tokens, top_k)
    weights = torch.rand(tokens, top_k, device=y.device)
    flat, owner = weights.new_empty(y.shape[0]), torch.empty(y.shape[0], dtype=torch.int64, device=y.device)
    flat[slots.flatten().long()] = weights.flatten()
    owner[slots.flatten().long()] = torch.arange(tokens, device=y.device).repeat_interleave(top_k)

    def by_torch() -> torch.Tensor:
        weighted = (y.float() * flat.unsqueeze(1)).to(y.dtype)
        return torch.zeros(tokens, y.shape[1], dtype=y.dtype, device=y.device).index_add_(0, owner, weighted)

    def check() -> None:
        assert sqnr(sum_rows(y, slots, weights), by_torch()) >= COMBINE_SQNR_DB

    moved, shape = 2 * (y.numel() + tokens * y.shape[1]) + 8 * slots.numel(), f"{tokens}x{top_k}x{y.shape[1]}"
    for name, run in (("combine", lambda: sum_rows(y, slots, weights)), ("combine-torch", by_torch)):
        yield Case(name=f"routing-{name}", shape=shape, run=run, check=check, bytes_moved=moved)
