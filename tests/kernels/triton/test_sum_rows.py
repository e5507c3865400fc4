"""The Triton kernel of sum_rows against the op's definition, bit for bit; GPU twins at the end."""

import pytest
import torch

from aotrain.kernels.sum_rows import _cuda
from aotrain.kernels.triton import sum_rows as kernels
from aotrain.testing import assert_bitwise_equal

reference = torch.ops.aotrain.sum_rows
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_sums(
    dtype: torch.dtype, columns: int, weights_dtype: torch.dtype | None, top_k: int = 3, device: str = "cpu"
) -> None:
    y = torch.randn(9, columns + 3).to(dtype)[:, :columns]
    slots = torch.randint(-1, 9, (7, top_k), dtype=torch.int32)
    weights = None if weights_dtype is None else torch.randn(7, top_k).to(weights_dtype)
    moved = None if weights is None else weights.to(device)
    assert_bitwise_equal(kernels.sum_rows(y.to(device), slots.to(device), moved), reference(y, slots, weights))


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("weights_dtype", [None, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("columns", [1, 33, 512])
    def test_sums(self, dtype: torch.dtype, weights_dtype: torch.dtype | None, columns: int) -> None:
        assert_sums(dtype, columns, weights_dtype)

    def test_rows_longer_than_a_tile_and_no_choices(self) -> None:
        assert_sums(torch.bfloat16, 1100, torch.float32, top_k=1)
        assert_sums(torch.bfloat16, 8, torch.float32, top_k=0)

    def test_columns_first(self) -> None:
        y, slots = torch.randn(5, 9).t(), torch.tensor([[8, 0]], dtype=torch.int32)
        assert_bitwise_equal(kernels.sum_rows(y, slots, None), reference(y, slots, None))

    def test_the_op_of_a_gpu_calls_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called = []
        monkeypatch.setattr(kernels, "sum_rows", lambda *args: called.append(len(args)))
        _cuda(torch.ones(2, 2), torch.zeros(1, 1, dtype=torch.int32), None)
        assert called == [3]


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("columns", [33, 7168])
    def test_sums(self, dtype: torch.dtype, weights_dtype: torch.dtype | None, columns: int) -> None:
        assert_sums(dtype, columns, weights_dtype, top_k=8, device="cuda")
