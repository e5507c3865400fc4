"""FSDP2 with weights gathered as codes: bit-equal to gathering them in high precision, on 2 and 4 gloo ranks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.fsdp_weight import fsdp_weight_of
from aotrain.nn.fsdp_wrap import precompute_float8_dynamic_scale_for_fsdp
from aotrain.optim import AdamW8bit
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

# 300 rows over 2 or 4 ranks cut blocks of 128; 97 divides by neither; of 5 rows over 4 ranks one gets none.
SIZES = (130, 300, 97, 5)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MASTER = MixedPrecisionPolicy()


class Checkpointed(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def build(recipe: str, gather: bool, *, container: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(k, n, bias=n != 97) for k, n in zip(SIZES, SIZES[1:], strict=False)]
    model = nn.Sequential(*(container(layer, nn.Tanh()) for layer in layers))
    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=gather)
    convert_to_float8_training(model, config=config)
    return model


def shard(model: nn.Sequential, policy: MixedPrecisionPolicy = BF16, **options: Any) -> nn.Sequential:
    for module in (*model, model):
        fully_shard(module, mp_policy=policy, **options)
    return model


def step(model: nn.Module, seed: int) -> list[torch.Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    x = torch.randn(16, SIZES[0], generator=torch.Generator().manual_seed(seed * 100 + rank)).requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 3, passes: int = 1) -> list[torch.Tensor]:
    """Everything that came out: outputs, gradients of input and weights, the norm, and the weights at the end."""
    seen = []
    for number in range(steps):
        for part in range(passes):
            seen += step(model, number * passes + part)
        seen += [param.grad.to_local().clone() for param in model.parameters() if param.grad is not None]
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        seen.append(model(torch.ones(2, SIZES[0])))
    for module in (*model, model):
        module.reshard()
    return seen + [param.full_tensor() for param in model.parameters()]


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def case(name: str, recipe: str, gather: bool) -> list[torch.Tensor]:
    if name == "master dtype":
        return train(model := shard(build(recipe, gather), MASTER), adamw(model))
    if name == "kept after forward":
        return train(model := shard(build(recipe, gather), reshard_after_forward=False), adamw(model))
    if name == "fused":
        return train(model := shard(build(recipe, gather)), adamw(model, fused=True))
    if name == "8-bit":
        return train(model := shard(build(recipe, gather)), AdamW8bit(model.parameters(), lr=1e-2))
    if name == "accumulation":
        return train(model := shard(build(recipe, gather)), adamw(model), passes=2)
    if name == "checkpointing":
        return train(model := shard(build(recipe, gather, container=Checkpointed)), adamw(model))
    if name == "hybrid":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        return train(model := shard(build(recipe, gather), mesh=mesh), adamw(model))
    assert name == "changed outside of optimizers"
    model = shard(build(recipe, gather))
    step(model, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    seen = step(model, 1)
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    seen += step(model, 2)
    with torch.no_grad():  # what only the explicit call sees: a write without a version
        for param in model.parameters():
            param.to_local().data.mul_(5)
    precompute_float8_dynamic_scale_for_fsdp(model)
    return seen + step(model, 3)


CASES = {
    "master dtype": list(RECIPES),
    "kept after forward": ["rowwise"],
    "fused": list(RECIPES),
    "8-bit": ["tensorwise"],
    "accumulation": ["blockwise"],
    "checkpointing": ["rowwise", "tensorwise"],
    "hybrid": ["rowwise", "blockwise"],
    "changed outside of optimizers": ["tensorwise", "rowwise"],
}


def compare(rank: int, world_size: int) -> None:
    for name, recipes in CASES.items():
        for recipe in recipes:
            if name == "hybrid" and world_size < 4:
                continue
            want, got = case(name, recipe, gather=False), case(name, recipe, gather=True)
            assert len(want) == len(got) >= 6
            for number, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_bitwise_equal(a, b, what=f"{name}, {recipe}, rank {rank}, result {number}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_gathered_codes_give_the_bits_of_gathered_values(world_size: int):
    run_ranks(compare, world_size)
