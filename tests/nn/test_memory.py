"""What a Llama block keeps for backward: never more in low precision than in bfloat16."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.recipes import RECIPES

TOKENS, DIM, HIDDEN, HEADS = 256, 128, 448, 4


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm, in the order of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        q, k, v = (w(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def kept_bytes(config: Float8LinearConfig | None) -> int:
    """Bytes of the distinct memory that autograd keeps of one forward, without the parameters."""
    torch.manual_seed(0)
    block = Block().bfloat16()
    if config is not None:
        convert_to_float8_training(block, config=config)
    parameters = {param.untyped_storage().data_ptr() for param in block.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(2, TOKENS // 2, DIM, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_keeps_no_more_than_in_bfloat16(name: str):
    config = Float8LinearConfig.from_recipe_name(name)
    assert kept_bytes(config) <= kept_bytes(None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_that_keeps_codes_keeps_no_more_either(name: str):
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(name), save_for_backward="quantized")
    assert kept_bytes(config) <= kept_bytes(None)
