"""Compiled blocks with weights that FSDP2 gathers as codes: one graph without breaks, the bits of eager, two ranks."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.nn.fsdp_weight import FsdpWeight
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

# Rows that two ranks cut inside a block of 128, and unevenly.
WIDTH, HIDDEN = 34, 131
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# Different codes for forward and backward, and one set for both.
TWO_PLANES, ONE_PLANE = "float8_rowwise", "float8_tensorwise"


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)
        self.checkpointed = checkpointed

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)


def build(recipe: str, gather: bool, *, checkpointed: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=gather)
    return convert_to_float8_training(nn.Sequential(Block(checkpointed), Block(checkpointed)), config=config)


def shard(model: nn.Sequential, *, compiled: bool, backend: str = "aot_eager", **options: Any) -> nn.Sequential:
    """In the order of torchtitan: blocks are compiled, then sharded."""
    for block in model:
        if compiled:
            block.compile(backend=backend, fullgraph=True)
        fully_shard(block, mp_policy=POLICY, **options)
    return fully_shard(model, mp_policy=POLICY, **options)


def train(model: nn.Sequential, *, steps: int = 2) -> list[torch.Tensor]:
    """Outputs and gradients of steps of two passes each, and the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    seen = []
    for number in range(steps):
        for part in range(2):
            seed = (number * 2 + part) * 2 + dist.get_rank()
            x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            y = model(x)
            y.float().square().mean().backward()
            assert x.grad is not None
            seen += [y.detach(), x.grad]
        seen += [param.grad.to_local().clone() for param in model.parameters() if param.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [param.full_tensor() for param in model.parameters()]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], what: str) -> None:
    assert len(got) == len(want) > 16
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise_equal(a, b, what=f"{what}, rank {dist.get_rank()}, result {number}")


def like_eager(rank: int, world_size: int) -> None:
    torch._dynamo.config.error_on_recompile = True
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [(recipe, {}, {}) for recipe in FLOAT8_LINEAR_RECIPES]
    for recipe in (TWO_PLANES, ONE_PLANE):
        cases.append((recipe, {}, {"reshard_after_forward": False}))
        # Backward repeats a forward, whose codes are not those that are gathered for backward.
        cases += [(recipe, {"checkpointed": True}, {"reshard_after_forward": each}) for each in (True, False)]
    for recipe, of_model, of_sharding in cases:
        eager = train(shard(build(recipe, True, **of_model), compiled=False, **of_sharding))
        compiled = train(shard(build(recipe, True, **of_model), compiled=True, **of_sharding))
        assert_same(compiled, eager, f"{recipe}, {of_model}, {of_sharding}")


def test_one_graph_for_all_blocks_and_steps_with_the_bits_of_eager():
    run_ranks(like_eager, 2)


def inductor(rank: int, world_size: int) -> None:
    torch._dynamo.config.error_on_recompile = True
    # Compared with compiled blocks that cast gathered values: inductor rounds what lies between the layers differently.
    values, codes = (
        train(shard(build(TWO_PLANES, gather), compiled=True, backend="inductor")) for gather in (False, True)
    )
    assert_same(codes, values, "inductor")


def test_inductor_gives_the_bits_of_gathered_values():
    run_ranks(inductor, 2)


def extra_gathers(rank: int, world_size: int) -> list[int]:
    """Gathers in a step of planes that FSDP2 has not gathered: eager and compiled, for each case in turn."""
    gathered: list[object] = []
    original = FsdpWeight._gather
    FsdpWeight._gather = lambda self, *args, **kwargs: gathered.append(self) or original(self, *args, **kwargs)
    counts = []
    for recipe, reshard, checkpointed in CASES_OF_GATHERS:
        for compiled in (False, True):
            gathered.clear()
            model = build(recipe, True, checkpointed=checkpointed)
            train(shard(model, compiled=compiled, reshard_after_forward=reshard), steps=1)
            counts.append(len(gathered))
    return counts


# Recipe, reshard_after_forward, checkpointed -> eager, and the most compiled; of two blocks of two layers, two passes.
CASES_OF_GATHERS = {
    (ONE_PLANE, False, True): (0, 0),
    (TWO_PLANES, True, False): (0, 0),
    (TWO_PLANES, False, False): (8, 8),
    # A compiler does not repeat a block's last product, which nothing in backward needs; that of torch 2.11 none.
    (TWO_PLANES, True, True): (8, 4),
}


def test_a_compiled_block_gathers_no_more_than_an_eager_one():
    counts = iter(run_ranks(extra_gathers, 2)[0])
    for case, (eager, compiled_at_most) in CASES_OF_GATHERS.items():
        assert next(counts) == eager, case
        assert next(counts) <= compiled_at_most, case
