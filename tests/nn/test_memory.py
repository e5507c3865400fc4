"""What a Llama block keeps for backward: never more in low precision than in bfloat16."""

import dataclasses
import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.ops import scaled_linear
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
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


def build(config: Float8LinearConfig | None) -> Block:
    torch.manual_seed(0)
    block = Block().bfloat16()
    if config is not None:
        convert_to_float8_training(block, config=config)
    return block


@functools.cache
def kept_bytes(config: Float8LinearConfig | None, backend: str | None = None) -> dict[torch.dtype, int]:
    """Bytes of the distinct memory that autograd keeps of one forward, by dtype, without the parameters."""
    torch.compiler.reset()
    block = build(config)
    parameters = {param.untyped_storage().data_ptr() for param in block.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    x = torch.randn(2, TOKENS // 2, DIM, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (block if backend is None else torch.compile(block, fullgraph=True, backend=backend))(x)
    by_dtype: dict[torch.dtype, int] = {}
    for tensor in kept.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
    return by_dtype


def total(config: Float8LinearConfig | None, backend: str | None = None) -> int:
    return sum(kept_bytes(config, backend).values())


def config_of(name: str, save_for_backward: str = "high_precision") -> Float8LinearConfig:
    return dataclasses.replace(Float8LinearConfig.from_recipe_name(name), save_for_backward=save_for_backward)


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_a_block_keeps_no_more_than_in_bfloat16(name: str):
    assert total(config_of(name)) <= total(None)


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_a_block_that_keeps_codes_keeps_no_more_either(name: str):
    assert total(config_of(name, "quantized")) <= total(None)


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_a_block_that_recomputes_keeps_what_bfloat16_keeps_and_no_codes(name: str):
    for backend in (None, "aot_eager"):
        want = kept_bytes(None, backend)
        assert kept_bytes(config_of(name, "recompute"), backend) == want
        assert all(dtype.itemsize > 1 for dtype in want)


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_a_compiled_block_that_may_keep_codes_of_its_inputs_keeps_fewer_bytes(name: str):
    high_precision = total(None, "aot_eager")
    for choice in ("high_precision", "quantized"):
        kept = total(config_of(name, choice), "aot_eager")
        # Codes of the input take half the bytes, of which only the product of grad_weight has a use.
        assert kept < high_precision if RECIPES[name].grad_weight.quantized else kept == high_precision


@pytest.mark.parametrize("choice", SAVE_FOR_BACKWARD)
@pytest.mark.parametrize("name", ["float8_rowwise", "float8_blockwise"])
def test_codes_of_a_weight_that_is_no_parameter_are_not_kept(name: str, choice: str):
    # A compiler takes a parameter for free to keep, and any other tensor for more bytes than its codes.
    torch.compiler.reset()
    weight, x = torch.randn(96, 64, requires_grad=True), torch.randn(48, 64)
    kept: list[torch.Tensor] = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return scaled_linear(x, weight, None, RECIPES[name], save_for_backward=choice)

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight)
    assert weight.data_ptr() in [tensor.data_ptr() for tensor in kept]
    assert not any(tensor.itemsize == 1 and 96 in tensor.shape for tensor in kept)


def codes_alive() -> dict[int, torch.UntypedStorage]:
    """The memory of matrices of one-byte elements, by address, whoever holds it."""
    gc.collect()
    # Tensors that compilations of other tests leave behind have no memory.
    tensors = [
        each for each in gc.get_objects() if type(each) is torch.Tensor and not torch._is_functional_tensor(each)
    ]
    storages = (each.untyped_storage() for each in tensors if each.itemsize == 1 and each.dim() == 2)
    return {storage.data_ptr(): storage for storage in storages}


@pytest.mark.parametrize("choice", SAVE_FOR_BACKWARD)
def test_codes_of_weights_that_are_alive_between_two_passes(choice: str):
    block, before = build(config_of("float8_rowwise", choice)), codes_alive()
    x = torch.randn(2, TOKENS // 2, DIM, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # a weight's codes are kept from the second use on
        block(x).sum().backward()
    alive = sum(storage.nbytes() for address, storage in codes_alive().items() if address not in before)
    weights = sum(param.numel() for param in block.parameters() if param.dim() == 2)
    assert alive == (0 if choice == "recompute" else 2 * weights)
