"""Attention over packed documents with plain SDPA, for devices without FlexAttention or flash kernels.

A training sequence holds several documents. torchtitan hands their boundaries to every attention whose config is a
``VarlenAttention.Config``, so subclassing that config is all it takes to keep documents apart:
``out[i] = softmax(q[i] . k[j]) v[j]`` over ``j <= i`` within the same document.

The mask is boolean [B, 1, L, L]: B * L * L bytes, fine up to a few thousand tokens. Context parallelism and sliding
windows are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata
from torchtitan.protocols.module import Module


class DocumentSDPA(VarlenAttention):
    """Block-causal attention through ``scaled_dot_product_attention``."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def __init__(self, config: Config) -> None:
        # Not VarlenAttention.__init__: it would switch on a flash-attention implementation.
        Module.__init__(self)
        if tuple(config.window_size) != (-1, 0):
            raise ValueError(f"DocumentSDPA is causal without a window; got window_size {config.window_size}")

    # The argument names are a contract: torchtitan's sharding config binds them by name.
    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: VarlenMetadata | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **unused: object,
    ) -> torch.Tensor:
        """Shapes [B, L, N, H] in and out; ``attention_masks`` None means one document per sequence."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))  # [B, N, L, H]
        if attention_masks is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        else:
            mask = document_mask(attention_masks.cu_seq_q, q_BLNH.shape[0], q_BLNH.shape[1])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


def document_mask(cu_seq: torch.Tensor, batch: int, seq_len: int) -> torch.Tensor:
    """Which key j a query i may see.

    Args:
        cu_seq: int [documents + 1], where documents start in the batch laid out as one row of batch * seq_len tokens.

    Returns:
        bool [batch, 1, seq_len, seq_len], True where j <= i and both tokens are of one document.
    """
    token = torch.arange(batch * seq_len, device=cu_seq.device, dtype=cu_seq.dtype)
    document = torch.searchsorted(cu_seq, token, right=True).view(batch, seq_len)
    same = document[:, :, None] == document[:, None, :]
    return (same & _causal(seq_len, cu_seq.device))[:, None]


def _causal(seq_len: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(seq_len, device=device)
    return position[:, None] >= position[None, :]
