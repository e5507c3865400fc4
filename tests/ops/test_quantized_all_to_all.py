"""The parts of the quantized all-to-all that need no second process; tests/distributed has the collectives."""

import pytest
import torch

from aotrain.formats import BLOCKWISE_128X128, FLOAT8_E4M3, ScaledTensor, Scaling, dequantize, fake_quantize, quantize
from aotrain.kernels import expert_major_permutation
from aotrain.ops.quantized_all_to_all import (
    FLOAT8_ROWS,
    MXFP8_ROWS,
    PAYLOADS,
    Payload,
    QuantizedRows,
    all_to_all_dispatch,
    dequantize_rows,
    permute_quantized,
)
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

SCALINGS = [MXFP8_ROWS, FLOAT8_ROWS]


def here(x: torch.Tensor, scaling: Scaling, dtype: torch.dtype) -> tuple[QuantizedRows, torch.Tensor]:
    """Rows as if they had arrived, and the tensor that gradients reach."""
    leaf = torch.zeros(x.shape, dtype=dtype, requires_grad=True)
    return QuantizedRows(quantize(x, scaling), leaf * 1), leaf


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_and_gradient_of_quantized_rows(scaling: Scaling, dtype: torch.dtype) -> None:
    x = torch.randn(9, 70).to(dtype)
    rows, leaf = here(x, scaling, dtype)
    values = dequantize_rows(rows)
    assert_bitwise_equal(values.detach(), fake_quantize(x, scaling))
    grad = torch.randn(9, 70).to(dtype)
    values.backward(grad)
    assert_bitwise_equal(leaf.grad, grad)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_permuting_codes_is_permuting_values(scaling: Scaling) -> None:
    x = adversarial_matrix(11, 70)
    permutation = expert_major_permutation(
        torch.tensor([3, 0, 5, 1, 2, 0]), 3, num_rows=11, num_permuted=24, alignment=4
    )
    padded = torch.zeros(24, 70, dtype=x.dtype)
    real = permutation.indices >= 0
    padded[real] = x[permutation.indices[real].long()]
    rows, leaf = here(x, scaling, torch.bfloat16)
    permuted = permute_quantized(rows, permutation)
    want = quantize(padded, scaling)
    assert_bitwise_equal(permuted.q.data, want.data)
    assert_bitwise_equal(permuted.q.scale, want.scale)
    assert permuted.q.data.is_contiguous()
    assert permuted.handle.isnan().all()  # reading it by mistake shows
    grad = torch.randn(24, 70).bfloat16()
    permuted.handle.backward(grad)
    unpadded = torch.zeros(11, 70, dtype=torch.bfloat16)
    unpadded[permutation.indices[real].long()] = grad[real]
    assert_bitwise_equal(leaf.grad, unpadded)


def test_quantizing_sent_values_again_loses_nothing() -> None:
    # rceil halves a scale when amax rounds to half the maximum; the values stay the same.
    x = torch.randn(4096, 32).bfloat16()
    x[0] = 225.0  # rounds to 224
    sent = quantize(x, MXFP8_ROWS)
    again = quantize(dequantize(sent, torch.bfloat16), MXFP8_ROWS)
    assert (again.scale.view(torch.uint8) != sent.scale.view(torch.uint8)).any()
    assert_bitwise_equal(dequantize(again), dequantize(sent))


def test_quantizing_sent_values_along_the_rows_loses_nothing_that_is_normal() -> None:
    x = torch.randn(4096, 32).bfloat16()
    q = quantize(x, MXFP8_ROWS)
    sent = dequantize(q, torch.bfloat16)
    want, got = (quantize(values.t().contiguous(), MXFP8_ROWS) for values in (x, sent))
    scales = torch.stack([q.scale.float().expand(-1, 32), want.scale.float().repeat_interleave(32, 1).t()])
    normal = (x.float().abs() >= 2.0**-6 * scales).all(0)
    assert 0.99 < normal.float().mean() < 1
    assert_bitwise_equal(dequantize(got).t()[normal], dequantize(want).t()[normal])


def test_payloads() -> None:
    assert PAYLOADS["mxfp8"] == Payload()
    assert Payload().dispatch == Payload().combine_grad == MXFP8_ROWS
    assert Payload().dispatch_grad is None
    assert Payload().combine is None
    assert all(getattr(PAYLOADS["high_precision"], name) is None for name in Payload.__slots__)
    with pytest.raises(ValueError, match="scales of one row each"):
        Payload(combine=Scaling(element=FLOAT8_E4M3, block=BLOCKWISE_128X128))


def test_errors_come_before_the_collective() -> None:
    for x, splits in ((torch.ones(3, 4), [1, 1]), (torch.ones(3), [1, 2])):
        for forward in (None, MXFP8_ROWS):
            with pytest.raises(ValueError, match=f"want a matrix of {sum(splits)} rows"):
                all_to_all_dispatch(x, [1, 1], splits, forward=forward)


def test_a_bad_row_stays_alone() -> None:
    x = torch.ones(3, 64)
    x[1, 40] = torch.inf
    values = dequantize(ScaledTensor(*quantize(x, MXFP8_ROWS)))
    assert values[1, 32:].isnan().all()
    assert values[0].eq(1).all()
    assert values[1, :32].eq(1).all()
