"""Q4_0 equals the gguf package bit for bit, and is idempotent."""

import numpy
import pytest
import torch

from aotrain.formats.q4_0 import dequantize_q4_0, quantize_q4_0


def cases() -> torch.Tensor:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    x[0] = 0
    x[1, ::2], x[1, 1::2] = 1.0, -1.0  # the first of equal magnitudes decides
    return x


def test_equals_gguf():
    gguf = pytest.importorskip("gguf", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    packed = gguf.quants.quantize(cases().numpy(), gguf.GGMLQuantizationType.Q4_0)
    want = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    assert numpy.array_equal(dequantize_q4_0(quantize_q4_0(cases())).numpy(), want)


def test_quantizing_again_changes_nothing():
    x = cases()[8:]  # scales in float16's normal range
    once = quantize_q4_0(x)
    again = quantize_q4_0(dequantize_q4_0(once))
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scale, again.scale)


def test_columns_that_are_no_blocks_are_an_error():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_q4_0(torch.zeros(4, 40))
