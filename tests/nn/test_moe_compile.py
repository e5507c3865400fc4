"""Compiled experts: one graph, the bits of eager, and calls that stay intercepted."""

import copy

import pytest
import torch
from torch import nn

from aotrain.nn import convert_moe_training
from aotrain.testing import assert_bitwise_equal
from tests.nn.experts import Experts, LoopedExperts, MoE, rows


class FunctionalExperts(Experts):
    def multiply(self, x, weight, offs):
        return nn.functional.grouped_mm(x, weight, offs=offs)


class OverloadExperts(Experts):
    def multiply(self, x, weight, offs):
        return torch.ops.aten._grouped_mm(x, weight.contiguous(), offs)


class PropertyExperts(Experts):
    def forward(self, x, offs):
        h = torch._grouped_mm(x.bfloat16(), self.up.mT.bfloat16(), offs=offs).relu()
        return torch._grouped_mm(h, torch.cat([self.down[:2], self.down[2:]]).bfloat16().mT, offs=offs)


def gradients(module: nn.Module, forward: object, x: torch.Tensor, offs: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x, offs)
    out.backward(torch.ones_like(out))
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("recipe", ["float8_rowwise", "float8_blockwise"])
@pytest.mark.parametrize("cls", [Experts, FunctionalExperts, OverloadExperts, PropertyExperts])
def test_one_graph_with_the_bits_of_eager(cls: type[Experts], recipe: str):
    torch.compiler.reset()
    experts = convert_moe_training(cls(), recipe)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            torch.manual_seed(step)
            inputs = rows()
            for a, b in zip(gradients(experts, compiled, *inputs), gradients(experts, experts, *inputs), strict=True):
                assert_bitwise_equal(a, b)


class Mixed(Experts):
    def forward(self, x, offs, other):
        own = torch._grouped_mm(x.bfloat16(), self.up.mT.bfloat16(), offs=offs)
        return (
            own,
            torch._grouped_mm(x.bfloat16(), other, offs=offs),
            torch._grouped_mm(x.bfloat16(), -other, offs=offs),
        )


def test_other_tensors_of_a_weights_sizes_pass_through():
    torch.compiler.reset()
    experts = Mixed()
    x, offs = rows()
    inputs = (x, offs, torch.randn(4, 32, 48).bfloat16())
    plain = experts(*inputs)
    got = torch.compile(convert_moe_training(experts), fullgraph=True, backend="aot_eager")(*inputs)
    assert not torch.equal(got[0], plain[0])
    assert_bitwise_equal(got[1], plain[1])
    assert_bitwise_equal(got[2], plain[2])


def test_a_number_of_rows_that_changes():
    torch.compiler.reset()
    model = convert_moe_training(MoE(Experts()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (16, 9, 31):
        x = torch.randn(tokens, 32)
        assert_bitwise_equal(compiled(x), model(x))


def test_a_loop_is_refused_when_it_is_traced():
    torch.compiler.reset()
    experts = copy.deepcopy(convert_moe_training(LoopedExperts()))
    with pytest.raises(RuntimeError, match="called no grouped GEMM"):
        torch.compile(experts, backend="aot_eager")(*rows())
