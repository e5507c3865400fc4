"""sum_rows: by definition, rounded once and in order, odd inputs, and as an op."""

import pytest
import torch

from aotrain.kernels import sum_rows
from aotrain.testing import assert_bitwise_equal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SLOTS = torch.tensor([[2, 0, 5], [-1, 3, 3], [4, -1, -1], [-1, -1, -1]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [None, *DTYPES], ids=str)
def test_by_definition(dtype: torch.dtype, weights_dtype: torch.dtype | None) -> None:
    y = torch.randn(6, 7).to(dtype)
    weights = None if weights_dtype is None else torch.rand(4, 3).to(weights_dtype)
    want = torch.zeros(4, 7)
    for token, slots in enumerate(SLOTS.tolist()):
        for choice, slot in enumerate(slots):
            if slot >= 0:
                want[token] += y[slot].float() * (1.0 if weights is None else weights[token, choice].float())
    for source in (y, y.t().contiguous().t(), torch.cat([y, y], dim=1)[:, :7]):
        assert_bitwise_equal(sum_rows(source, SLOTS, weights), want.to(dtype))


def test_rounds_once() -> None:
    y = torch.tensor([[1.0], [2.0**-9], [2.0**-9]]).bfloat16()
    assert sum_rows(y, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 1.0  # a tie, to even
    y[2] = 2.0**-8
    assert sum_rows(y, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 1 + 2.0**-7


def test_order_of_the_sum() -> None:
    y = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert sum_rows(y, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 0.0
    assert sum_rows(y, torch.tensor([[0, 2, 1]], dtype=torch.int32)).item() == 1.0


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (3, 0)])
def test_nothing_to_sum(tokens: int, top_k: int) -> None:
    slots = torch.empty(tokens, top_k, dtype=torch.int32)
    assert_bitwise_equal(sum_rows(torch.ones(2, 5), slots), torch.zeros(tokens, 5))


def test_errors() -> None:
    with pytest.raises(TypeError, match="want float32, bfloat16 or float16"):
        sum_rows(torch.ones(6, 7, dtype=torch.float64), SLOTS)
    with pytest.raises(ValueError, match=r"weights of shape \(4, 2\)"):
        sum_rows(torch.ones(6, 7), SLOTS, torch.ones(4, 2))


@pytest.mark.parametrize("weights", [None, torch.ones(4, 3)], ids=["plain", "weighted"])
def test_opcheck(weights: torch.Tensor | None) -> None:
    torch.library.opcheck(torch.ops.aotrain.sum_rows, (torch.randn(6, 7), SLOTS, weights))
