"""Tokens to rows and back: order, values and gradients by definition, sums in a fixed order."""

import pytest
import torch

from aotrain.ops.token_order import combine_rows, expand_rows, sort_by_expert
from aotrain.testing import assert_bitwise_equal

IDS = torch.tensor([[2, 0], [1, 2], [0, 3], [2, 1], [0, 0]])


def test_rows_are_sorted_by_expert_and_stable() -> None:
    order = sort_by_expert(IDS)
    assert order.tokens.tolist() == [0, 2, 4, 4, 1, 3, 0, 1, 3, 2]
    assert IDS.flatten()[torch.argsort(order.slots.flatten())].tolist() == sorted(IDS.flatten().tolist())
    for token, slots in enumerate(order.slots.tolist()):
        assert [order.tokens[slot].item() for slot in slots] == [token, token]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    order = sort_by_expert(IDS)
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    rows = expand_rows(x, order)
    assert_bitwise_equal(rows.detach(), x.detach()[order.tokens.long()])
    y = rows.detach().clone().requires_grad_()
    weights = torch.rand(5, 2).requires_grad_()
    out = combine_rows(y, weights, order)
    chosen = y.detach().float()[order.slots.long()]  # [tokens, top_k, 7]
    scaled = chosen * weights.detach().unsqueeze(-1)
    assert_bitwise_equal(out.detach(), (scaled[:, 0] + scaled[:, 1]).to(dtype))

    grad = torch.randn(5, 7).to(dtype)
    out.backward(grad)
    want = torch.zeros(10, 7, dtype=dtype)
    for token, slots in enumerate(order.slots.tolist()):
        for choice, slot in enumerate(slots):
            want[slot] = (grad[token].float() * weights.detach()[token, choice]).to(dtype)
    assert_bitwise_equal(y.grad, want)
    assert_bitwise_equal(weights.grad, (chosen * grad.float().unsqueeze(1)).sum(-1))

    rows.backward(want)
    total = want.float()[order.slots.long()]
    assert_bitwise_equal(x.grad, (total[:, 0] + total[:, 1]).to(dtype))


def test_gradcheck() -> None:
    order = sort_by_expert(torch.tensor([[0, 1, 3], [3, 1, 2]]))
    x = torch.randn(2, 4, requires_grad=True)
    weights = torch.rand(2, 3, requires_grad=True)

    def both(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return combine_rows(expand_rows(x, order).square(), weights, order)

    def by_autograd(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (x.square().unsqueeze(1) * weights.unsqueeze(-1)).sum(1)

    grad = torch.randn(2, 4)
    got = torch.autograd.grad(both(x, weights), (x, weights), grad)
    want = torch.autograd.grad(by_autograd(x, weights), (x, weights), grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ids", [torch.empty(0, 2, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)])
def test_no_rows(ids: torch.Tensor) -> None:
    order = sort_by_expert(ids)
    x = torch.randn(ids.shape[0], 4, requires_grad=True)
    weights = torch.rand(ids.shape, requires_grad=True)
    out = combine_rows(expand_rows(x, order), weights, order)
    assert_bitwise_equal(out.detach(), torch.zeros(ids.shape[0], 4))
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert weights.grad.shape == weights.shape


def test_shapes_are_checked() -> None:
    order = sort_by_expert(IDS)
    with pytest.raises(ValueError, match=r"want 10 rows and weights \(5, 2\)"):
        combine_rows(torch.ones(10, 3), torch.ones(5, 3), order)
