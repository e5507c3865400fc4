"""torchao's names: what they return and refuse without a second process."""

import pytest
import torch

from aotrain.formats import dequantize, quantize
from aotrain.ops import permute_and_pad
from aotrain.ops.mxfp8_expert_parallel import (
    a2a_dispatch_mxfp8_fwd_hp_bwd,
    permute_mxfp8_fwd_hp_bwd,
    unpermute_hp_fwd_mxfp8_bwd,
)
from aotrain.ops.quantized_all_to_all import MXFP8_ROWS, QuantizedRows, dequantize_rows
from aotrain.testing import assert_bitwise_equal


def test_permute_and_unpermute() -> None:
    counts = torch.tensor([3, 0, 5, 1, 2, 0])
    x = torch.randn(11, 70)
    leaf = torch.zeros_like(x, requires_grad=True)
    rows = QuantizedRows(quantize(x, MXFP8_ROWS), leaf * 1)
    shape, permuted, indices, sizes, offsets = permute_mxfp8_fwd_hp_bwd(rows, counts, 2, 3)
    want = permute_and_pad(dequantize(rows.q), counts, 2, 3, 32)
    assert shape == want[0] == (12, 70)
    assert_bitwise_equal(dequantize(permuted.q), want[1])
    for got, expected in zip((indices, sizes, offsets), want[2:], strict=True):
        assert_bitwise_equal(got, expected)
    back = unpermute_hp_fwd_mxfp8_bwd(dequantize_rows(permuted), indices, shape)
    assert_bitwise_equal(back.detach(), dequantize(rows.q))
    grad = torch.randn(11, 70)
    back.backward(grad)
    assert_bitwise_equal(leaf.grad, grad)


@pytest.mark.parametrize("options", [{"scaling_mode": "nearest"}, {"block_size": 16}])
def test_other_formats_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"want one of .*'rceil'"):
        a2a_dispatch_mxfp8_fwd_hp_bwd(torch.ones(1, 32), [1], [1], **options)
