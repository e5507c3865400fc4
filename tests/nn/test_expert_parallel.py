"""The expert-parallel layer in one process: by definition, without groups, and what it refuses."""

import pytest
import torch

from aotrain.nn.expert_parallel import ExpertParallel
from aotrain.ops import PAYLOADS
from aotrain.testing import assert_bitwise_equal
from tests.nn.moe_by_definition import exact_case, expert_loop, random_case, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_process_is_the_definition(dtype: torch.dtype, top_k: int) -> None:
    (x, ids, weights), (w1, w2) = random_case(19, num_experts=6, top_k=top_k, dtype=dtype)
    layer = ExpertParallel(num_experts=6)
    out = layer(x, ids, weights, lambda rows, offsets: expert_loop(rows, offsets, w1, w2))
    out.backward(torch.ones_like(out))
    got = [out.detach(), *(part.grad.clone() for part in (x, weights, w1, w2))]
    for part in (x, weights, w1, w2):
        part.grad = None
    # Nothing travels, so nothing is rounded whatever the payload.
    want = reference(x, ids, weights, w1, w2, PAYLOADS["high_precision"])
    want.backward(torch.ones_like(want))
    for a, b in zip(got, [want.detach(), *(part.grad for part in (x, weights, w1, w2))], strict=True):
        assert_bitwise_equal(a, b)


def test_padding_changes_nothing() -> None:
    (x, ids, weights), (w1, w2) = exact_case(19, num_experts=6)
    results = []
    for alignment in (1, 16):
        layer = ExpertParallel(num_experts=6, alignment=alignment)
        rows, offsets, route = layer.dispatch(x, ids)
        assert all(offset % alignment == 0 for offset in offsets.tolist())
        out = expert_loop(rows, offsets, w1, w2, activation=False)
        # What a grouped product leaves behind the last group.
        out = torch.cat([out[: offsets[-1]], torch.full_like(out[offsets[-1] :], torch.nan)])
        layer.combine(out, weights, route).sum().backward()
        results.append([part.grad.clone() for part in (x, weights, w1, w2)])
        for part in (x, weights, w1, w2):
            part.grad = None
    for padded, plain in zip(results[1], results[0], strict=True):
        assert_bitwise_equal(padded, plain)


def test_no_tokens() -> None:
    (x, ids, weights), (w1, w2) = random_case(0, num_experts=4)
    out = ExpertParallel(num_experts=4)(x, ids, weights, lambda rows, offsets: expert_loop(rows, offsets, w1, w2))
    assert out.shape == (0, w2.shape[1])
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_errors() -> None:
    with pytest.raises(ValueError, match="0 experts"):
        ExpertParallel(num_experts=0)
    with pytest.raises(ValueError, match="alignment of at least 1"):
        ExpertParallel(num_experts=2, alignment=0)
    layer = ExpertParallel(num_experts=4)
    with pytest.raises(ValueError, match=r"want \[tokens, columns\] and \[tokens, top_k\]"):
        layer.dispatch(torch.ones(3, 8), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="use dispatch"):
        layer.dispatch_quantized(torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64))
