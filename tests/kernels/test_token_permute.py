"""Indices of the expert-major order and the gather of rows: by definition, on odd sizes, and as ops."""

import pytest
import torch

from aotrain.kernels import RowPermutation, expert_major_permutation, gather_rows
from aotrain.testing import assert_bitwise_equal

# Counts [ranks, experts]; experts without tokens, ranks without, none at all.
COUNTS = {
    "mixed": [[3, 0, 5], [1, 2, 0]],
    "one_rank": [[4, 1, 0, 7]],
    "one_expert": [[2], [0], [3]],
    "one_of_all": [[0, 6]],
    "none": [[0, 0], [0, 0]],
    "aligned": [[4, 8], [4, 0]],
}

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32]
DTYPES += [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu]


def by_hand(counts: list[list[int]], alignment: int, min_rows: int, num_rows: int, num_permuted: int) -> RowPermutation:
    """The definition as a loop over experts and ranks."""
    starts, position = {}, 0
    for rank, row in enumerate(counts):
        for expert, count in enumerate(row):
            starts[rank, expert] = position
            position += count
    indices, sizes, offsets = [], [], []
    for expert in range(len(counts[0])):
        group = [starts[rank, expert] + i for rank, row in enumerate(counts) for i in range(row[expert])]
        padding = max(-(-len(group) // alignment) * alignment, min_rows) - len(group)
        indices += group + [-1] * padding
        sizes.append(len(group) + padding)
        offsets.append(len(indices))
    indices = (indices + [-1] * num_permuted)[:num_permuted]
    indices = [row if row < num_rows else -1 for row in indices]
    inverse = [indices.index(row) if row in indices else -1 for row in range(num_rows)]
    return RowPermutation(*(torch.tensor(part, dtype=torch.int32) for part in (indices, inverse, sizes, offsets)))


def assert_same(got: RowPermutation, want: RowPermutation) -> None:
    for name, a, b in zip(RowPermutation._fields, got, want, strict=True):
        assert_bitwise_equal(a, b, what=name)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("alignment", "min_rows"), [(1, 0), (4, 0), (4, 4), (1, 1)])
@pytest.mark.parametrize("surplus", [0, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_by_definition(counts, alignment: int, min_rows: int, surplus: int, dtype: torch.dtype) -> None:
    num_rows = sum(map(sum, counts)) + surplus
    num_permuted = num_rows + len(counts[0]) * alignment + surplus
    got = expert_major_permutation(
        torch.tensor(counts, dtype=dtype).flatten(),
        len(counts[0]),
        num_rows=num_rows,
        num_permuted=num_permuted,
        alignment=alignment,
        min_group_rows=min_rows,
    )
    assert_same(got, by_hand(counts, alignment, min_rows, num_rows, num_permuted))


def test_rows_that_do_not_fit_are_lost_and_nothing_else() -> None:
    counts = [[3, 2], [1, 4]]
    got = expert_major_permutation(torch.tensor(counts).flatten(), 2, num_rows=8, num_permuted=6, alignment=4)
    assert_same(got, by_hand(counts, 4, 0, 8, 6))
    assert (got.inverse == -1).any()


@pytest.mark.parametrize(
    ("tokens", "options", "error", "says"),
    [
        (torch.ones(4), {}, TypeError, "int32 or int64"),
        (torch.ones(5, dtype=torch.int64), {}, ValueError, r"\[ranks \* local experts\]"),
        (torch.ones(2, 2, dtype=torch.int64), {}, ValueError, r"\(2, 2\)"),
        (torch.ones(4, dtype=torch.int64), {"alignment": 0}, ValueError, "alignment >= 1"),
        (torch.ones(4, dtype=torch.int64), {"alignment": 4, "min_group_rows": 2}, ValueError, "multiple"),
    ],
)
def test_errors_of_indices(tokens, options, error, says) -> None:
    with pytest.raises(error, match=says):
        expert_major_permutation(tokens, 2, num_rows=4, num_permuted=8, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_copies_bits(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 256, (7, 5 * dtype.itemsize), dtype=torch.uint8)  # NaN payloads included
    x = bits.view(dtype)
    indices = torch.tensor([6, -1, 0, 3, 3, -1], dtype=torch.int32)
    want = torch.zeros(6, 5 * dtype.itemsize, dtype=torch.uint8)
    for row, index in enumerate(indices.tolist()):
        if index >= 0:
            want[row] = bits[index]
    for source in (x, torch.cat([bits, bits], dim=1).view(dtype)[:, :5], x.t().contiguous().t()):
        got = gather_rows(source, indices)
        assert got.is_contiguous()
        assert_bitwise_equal(got.view(torch.uint8), want)


@pytest.mark.parametrize(("rows", "columns", "length"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_gather_of_nothing(rows: int, columns: int, length: int) -> None:
    indices = torch.full((length,), -1, dtype=torch.int32)
    assert_bitwise_equal(gather_rows(torch.ones(rows, columns), indices), torch.zeros(length, columns))


def test_gather_wants_a_matrix_and_a_list() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        gather_rows(torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("surplus", [0, 2])
def test_opcheck(surplus: int) -> None:
    counts = torch.tensor(COUNTS["mixed"]).flatten()
    torch.library.opcheck(torch.ops.aotrain.expert_major_indices, (counts, 3, 4, 0, 11 + surplus, 24))
    x, indices = torch.randint(0, 9, (5, 3)), torch.tensor([4, -1, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.aotrain.gather_rows, (x, indices))
    torch.library.opcheck(torch.ops.aotrain.gather_rows, (x[:, :2], indices))
