"""NVFP4 layers under FSDP2 on gloo: bit-equal to one process, resumed by another number of ranks too."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aotrain.nn import NVFP4Linear
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

FULL = StateDictOptions(full_state_dict=True)


def build(world_size: int) -> nn.Module:
    """97 rows do not divide by the number of ranks, nor by blocks of 16."""
    torch.manual_seed(0)
    layers = [nn.Linear(130, 97), nn.ReLU(), nn.Linear(97, 130)]
    model = nn.Sequential(*(NVFP4Linear.from_float(m) if isinstance(m, nn.Linear) else m for m in layers))
    if world_size > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mp_policy=policy)
            layer.set_force_sum_reduction_for_comms(True)
            layer.set_gradient_divide_factor(1.0)
    return model


def train(rank: int, world_size: int, steps: list[int], start: dict | None) -> dict:
    """Plain gradient descent, whose only state is the parameters, from the given ones."""
    model = build(world_size)
    if start is not None:
        set_model_state_dict(model, start, options=FULL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        x = torch.randn(16, 130, generator=torch.Generator().manual_seed(step)).bfloat16()
        if world_size == 1:  # as FSDP2's mixed precision has it
            with torch.no_grad():
                shadow = [param.bfloat16() for param in model.parameters()]
            leaves = [copy.requires_grad_() for copy in shadow]
            names = [name for name, _ in model.named_parameters()]
            loss = torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), x).float().square().mean()
            for param, grad in zip(model.parameters(), torch.autograd.grad(loss, leaves), strict=True):
                param.grad = grad.float()
        else:
            # Gradients are summed over ranks and only rank 0 has any: the sum is exactly that of one process.
            share = 1.0 if dist.get_rank() == 0 else 0.0
            (model(x).float().square().mean() * share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in get_model_state_dict(model, options=FULL).items()}


def test_ranks_give_the_parameters_of_one_process_and_resume_them() -> None:
    start, middle, end = (train(0, 1, list(range(steps)), None) for steps in (0, 2, 4))
    assert list(end) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not torch.equal(start["0.weight"], end["0.weight"])
    resumed = run_ranks(train, 3, [2, 3], middle)
    for state in resumed:
        for name, value in state.items():
            assert_bitwise_equal(value, end[name], what=name)
