"""Compiled float8 layers: one graph for all steps, and the bits of eager."""

import dataclasses

import pytest
import torch
from torch import nn

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.ops.scaled_linear import SAVE_FOR_BACKWARD
from aotrain.testing import assert_bitwise_equal


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(name), **options)
    layers = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 32, bias=False))
    return convert_to_float8_training(layers.bfloat16(), config=config)


def train(model: nn.Module, forward: object, steps: int = 4) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = 0.0
        for _ in range(2):  # accumulated
            x = torch.randn(8, 32, generator=generator).bfloat16()
            part = forward(x).float().square().mean()
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.mark.parametrize("save_for_backward", SAVE_FOR_BACKWARD)
@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_one_graph_for_all_steps_with_the_bits_of_eager(name: str, save_for_backward: str):
    torch.compiler.reset()
    eager, compiled = (build(name, save_for_backward=save_for_backward) for _ in range(2))
    want = train(eager, eager)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = train(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.detach())


def test_autocast_and_a_new_batch_size_inside_a_compiled_region():
    torch.compiler.reset()
    model = build("rowwise").float()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (8, 5, 1):
        x = torch.randn(tokens, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_bitwise_equal(forward(x), model(x))
