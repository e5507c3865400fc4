"""Float8 layers under DistributedDataParallel, eager and compiled: two ranks train to the bits of one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.optim import AdamW8bit
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks


def train(rank: int, world_size: int, recipe: str, compiled: bool) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 96)).bfloat16()
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
    forward: nn.Module = DistributedDataParallel(model) if world_size > 1 else model
    if compiled:
        forward = torch.compile(forward, backend="aot_eager")
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    for step in range(3):
        # Every rank has the same rows, so that the mean of the gradients is the gradient of one process, exactly.
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step)).bfloat16()
        forward(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("recipe", "compiled"), [("tensorwise", False), ("rowwise", True), ("blockwise", False)])
def test_two_ranks_train_to_the_bits_of_one_process(recipe: str, compiled: bool):
    want = train(0, 1, recipe, compiled)
    for got in run_ranks(train, 2, recipe, compiled):
        for name, value in want.items():
            assert_bitwise_equal(got[name], value, what=name)
