"""Converted experts under FSDP2 and with their experts dealt onto ranks: bit-equal to one process."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from aotrain.nn import convert_moe_training, unconvert
from aotrain.nn.experts import expert_scaling
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks
from tests.nn.experts import Experts, MoE, rows


def shard(model: nn.Module) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model.experts, model):
        fully_shard(module, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def build(world_size: int, order: str) -> MoE:
    torch.manual_seed(0)
    model = MoE(Experts())
    if world_size == 1:
        return convert_moe_training(model.bfloat16())
    for step in order.split("+"):
        {"convert": convert_moe_training, "shard": shard}[step](model)
    return model


def train(rank: int, world_size: int, order: str) -> dict[str, torch.Tensor]:
    model = build(world_size, order)
    # One step: afterwards, one process has bfloat16 weights and the ranks float32 ones.
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    # Gradients are summed over ranks and only rank 0 has any, so the sum is that of one process.
    out = model(x)
    (out.float().square().mean() * (1.0 if rank == 0 else 0.0)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    assert list(get_model_state_dict(model)) == ["gate.weight", "experts.up", "experts.down", "lm_head.weight"]
    return {"out": out.detach(), **{name: grad.float() for name, grad in full.items()}}


@pytest.mark.parametrize("order", ["convert+shard", "shard+convert"])
def test_fsdp2_before_or_after(order: str):
    want = train(0, 1, order)
    for got in run_ranks(train, 2, order):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert_bitwise_equal(got[name], value, what=name)


def unconvert_sharded(rank: int, world_size: int) -> list[str]:
    model = build(world_size, "convert+shard")
    x = torch.randn(24, 32)
    before = model(x)
    unconvert(model)
    after = model(x)
    plain = build(world_size, "shard")
    assert expert_scaling(model.experts) is None
    assert isinstance(model.experts, type(plain.experts).__mro__[1])  # FSDPModule
    assert_bitwise_equal(after.detach(), plain(x).detach())
    assert not torch.equal(before, after)
    run_under_fsdp1()
    return [cls.__name__ for cls in type(model.experts).__mro__[:3]]


def run_under_fsdp1() -> None:
    """Forward and backward; FSDP1 puts tensors in place of the parameters."""
    x, offs = rows()
    for use_orig_params in (True, False):
        torch.manual_seed(0)
        experts = convert_moe_training(Experts())
        want = experts(x, offs)
        sharded = FullyShardedDataParallel(experts, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        got = sharded(x, offs)
        assert_bitwise_equal(got.detach(), want.detach())
        got.sum().backward()


def test_unconvert_under_fsdp2_and_training_under_fsdp1():
    for names in run_ranks(unconvert_sharded, 2):
        assert names == ["FSDPLowPrecisionExperts", "FSDPModule", "Experts"]


class LocalExperts(Experts):
    """Takes this rank's experts out of DTensors, as torchtitan's do."""

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        up, down = self.up.to_local().bfloat16(), self.down.to_local().bfloat16()
        h = torch._grouped_mm(x.bfloat16(), up.transpose(-2, -1), offs=offs).relu()
        return torch._grouped_mm(h, down.transpose(-2, -1), offs=offs)


def dealt_experts(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Eager, then compiled."""
    torch.manual_seed(0)
    experts = convert_moe_training(LocalExperts())
    mesh = init_device_mesh("cpu", (world_size,))
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    x, offs = torch.randn(20, 32), torch.tensor([3, 3, 11, 20], dtype=torch.int32)
    # This rank's two experts and their rows.
    mine = slice(0, 3) if rank == 0 else slice(3, 20)
    ends = offs[2 * rank : 2 * rank + 2] - mine.start
    results = []
    for forward in (experts, torch.compile(experts, backend="aot_eager", fullgraph=True)):
        experts.zero_grad()
        out = forward(x[mine], ends)
        out.sum().backward()
        gradients = {name: weight.grad.full_tensor() for name, weight in experts.named_parameters()}
        results.append({"out": out.detach(), **gradients})
    return results


def test_experts_dealt_onto_ranks_eager_and_compiled():
    torch.manual_seed(0)
    experts = convert_moe_training(Experts())
    out = experts(torch.randn(20, 32), torch.tensor([3, 3, 11, 20], dtype=torch.int32))
    out.sum().backward()
    for first, second in zip(*run_ranks(dealt_experts, 2), strict=True):
        assert_bitwise_equal(torch.cat([first["out"], second["out"]]), out.detach())
        for result in (first, second):
            assert_bitwise_equal(result["up"], experts.up.grad)
            assert_bitwise_equal(result["down"], experts.down.grad)
