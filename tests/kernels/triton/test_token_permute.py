"""The Triton kernels of token_permute against the ops' definitions, bit for bit; GPU twins at the end."""

import pytest
import torch

from aotrain.kernels import token_permute
from aotrain.kernels.triton import token_permute as kernels
from aotrain.testing import assert_bitwise_equal

CASES = {
    # counts [ranks, experts], alignment, rows of an empty group, rows before, rows after
    "exact": ([[3, 0, 5], [1, 2, 0]], 1, 0, 11, 11),
    "padded": ([[3, 0, 5], [1, 2, 0]], 4, 0, 11, 24),
    "empty_groups_take_rows": ([[3, 0, 5], [1, 2, 0]], 4, 4, 11, 24),
    "static_bounds": ([[3, 0, 5], [1, 2, 0]], 4, 0, 2100, 2200),
    "long": ([[1500, 9], [0, 1100]], 16, 0, 2609, 2656),
    "too_small": ([[3, 2], [1, 4]], 4, 0, 8, 6),
    "none": ([[0, 0]], 32, 0, 0, 64),
    "five_ranks": ([[1], [2], [3], [0], [5]], 8, 0, 11, 16),
}


def assert_indices(case: str, dtype: torch.dtype = torch.int64, device: str = "cpu") -> None:
    counts, *rest = CASES[case]
    flat = torch.tensor(counts, dtype=dtype).flatten()
    got = kernels.expert_major_indices(flat.to(device), len(counts[0]), *rest)
    want = token_permute._indices_reference(flat, len(counts[0]), *rest)
    for name, a, b in zip(token_permute.RowPermutation._fields, got, want, strict=True):
        assert_bitwise_equal(a, b, what=name)


def assert_gathers(dtype: torch.dtype, columns: int, rows: int = 9, length: int = 21, device: str = "cpu") -> None:
    limits = torch.iinfo(dtype)
    x = torch.randint(limits.min, limits.max, (rows, columns + 3), dtype=dtype)[:, :columns]
    indices = torch.randint(-1, rows, (length,), dtype=torch.int32)
    got = kernels.gather_rows(x.to(device), indices.to(device))
    assert_bitwise_equal(got, token_permute._gather_reference(x, indices))


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("case", CASES)
    def test_indices(self, case: str) -> None:
        assert_indices(case)

    def test_counts_of_32_bits(self) -> None:
        assert_indices("padded", torch.int32)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("columns", [1, 33, 520])
    def test_gather(self, dtype: torch.dtype, columns: int) -> None:
        assert_gathers(dtype, columns)

    def test_a_row_longer_than_a_tile(self) -> None:
        assert_gathers(torch.int64, 700, length=3)

    def test_no_rows(self) -> None:
        assert_gathers(torch.int16, 8, length=0)
        empty = kernels.gather_rows(torch.empty(0, 8, dtype=torch.int16), torch.full((3,), -1, dtype=torch.int32))
        assert_bitwise_equal(empty, torch.zeros(3, 8, dtype=torch.int16))

    def test_the_op_of_a_gpu_calls_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called = []
        for name in ("expert_major_indices", "gather_rows"):
            monkeypatch.setattr(kernels, name, lambda *args, name=name: called.append(name))
        token_permute._indices_cuda(torch.ones(2, dtype=torch.int64), 1, 1, 0, 2, 2)
        token_permute._gather_cuda(torch.ones(2, 2, dtype=torch.int16), torch.zeros(2, dtype=torch.int32))
        assert called == ["expert_major_indices", "gather_rows"]


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("case", CASES)
    def test_indices(self, case: str) -> None:
        assert_indices(case, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("columns", [1, 33, 7168])
    def test_gather(self, dtype: torch.dtype, columns: int) -> None:
        assert_gathers(dtype, columns, rows=300, length=1000, device="cuda")
