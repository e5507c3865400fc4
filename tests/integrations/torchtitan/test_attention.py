"""Document-masked SDPA against torchtitan's FlexAttention semantics and against one document at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import and_masks
from torchtitan.models.common.attention import (
    VarlenAttention,
    create_varlen_metadata_for_document,
    get_causal_mask_mod,
    get_document_mask_mod,
)

from aotrain.integrations.torchtitan.attention import DocumentSDPA, document_mask

# Two sequences of 8 tokens: documents of 3, 1, 4 and of 8.
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])


def qkv(heads: int = 2, kv_heads: int = 2) -> list[torch.Tensor]:
    shapes = [(2, 8, heads, 4), (2, 8, kv_heads, 4), (2, 8, kv_heads, 4)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_mask_equals_the_flex_attention_mask():
    mask_mod = and_masks(get_causal_mask_mod(), get_document_mask_mod(POSITIONS))
    index = torch.arange(8)
    reference = torch.stack(
        [mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index[None, :]) for b in range(2)]
    )
    cu_seq = create_varlen_metadata_for_document(POSITIONS).cu_seq_q
    assert torch.equal(document_mask(cu_seq, 2, 8)[:, 0], reference)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["mha", "gqa"])
def test_output_and_gradients_equal_one_document_at_a_time(kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    metadata = create_varlen_metadata_for_document(POSITIONS)
    attention = DocumentSDPA.Config().build()
    out = attention(q, k, v, attention_masks=metadata, enable_gqa=kv_heads == 1)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))

    parts = []
    for b, start, end in [(0, 0, 3), (0, 3, 4), (0, 4, 8), (1, 0, 8)]:
        a, c, d = (x[b : b + 1, start:end].transpose(1, 2) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(a, c, d, is_causal=True, enable_gqa=kv_heads == 1).transpose(1, 2))
    reference = torch.cat([torch.cat(parts[:3], dim=1), parts[3]])
    expected = torch.autograd.grad((reference * weights).sum(), (q, k, v))
    torch.testing.assert_close(out, reference)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_without_mask_it_is_causal():
    q, k, v = qkv()
    out = DocumentSDPA.Config().build()(q, k, v)
    reference = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, reference.transpose(1, 2))


def test_torchtitan_takes_it_for_varlen_attention():
    assert isinstance(DocumentSDPA.Config(), VarlenAttention.Config)


def test_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match=r"causal without a window; got window_size \(128, 0\)"):
        DocumentSDPA.Config(window_size=(128, 0)).build()
