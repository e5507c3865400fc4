"""Low-bit optimizers under FSDP1 with use_orig_params on gloo: float32 state, said once, saved in full, continued."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from aotrain.optim import AdamW8bit, AdamW32bit, convert_state
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

FULL = StateDictOptions(full_state_dict=True)
WRAP = ModuleWrapPolicy({nn.Linear})


def plain_model() -> nn.Module:
    """97 rows of 130: the flat buffer is cut in the middle of a row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(130, 97), nn.ReLU(), nn.Linear(97, 130))


def build(optimizer_class=AdamW8bit) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = FullyShardedDataParallel(
        plain_model(), use_orig_params=True, auto_wrap_policy=WRAP, device_id=torch.device("cpu")
    )
    return model, optimizer_class(model.named_parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    # Gradients are averaged over ranks and only rank 0 has any, so the mean is exactly the gradient of one process.
    share = 1.0
    if dist.is_initialized():
        share = float(dist.get_world_size()) if dist.get_rank() == 0 else 0.0
    for step in steps:
        x = torch.randn(16, 130, generator=torch.Generator().manual_seed(step))
        ((model(x) - x).square().mean() * share).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model: nn.Module, optimizer: torch.optim.Optimizer, interface: str) -> dict:
    if interface == "FSDP":
        # By default torch 2.13 moves each gathered tensor to the host by `.cpu()`, which for a model on the host copies
        # nothing, and gathers the next into the same buffer: exp_avg would be exp_avg_sq, in any optimizer.
        options = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *options):
            optim = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    else:
        optim = get_optimizer_state_dict(model, optimizer, options=FULL)
    # Step counts are the live tensors; what is saved must not move with the next step.
    return copy.deepcopy({"model": get_model_state_dict(model, options=FULL), "optim": optim})


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, interface: str) -> None:
    set_model_state_dict(model, state["model"], options=FULL)
    if interface == "FSDP":
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state["optim"]))
    else:
        set_optimizer_state_dict(model, optimizer, state["optim"], options=FULL)


def train_save_resume(rank: int, world_size: int, interface: str) -> dict:
    model, optimizer = build()
    train(model, optimizer, range(3))
    after_three = saved(model, optimizer, interface)
    train(model, optimizer, range(3, 5))
    resumed_model, resumed = build()
    load(resumed_model, resumed, after_three, interface)
    train(resumed_model, resumed, range(3, 5))
    return {
        "after_three": after_three,
        "whole": saved(model, optimizer, interface),
        "resumed": saved(resumed_model, resumed, interface),
    }


def tensors(state: dict) -> dict[str, torch.Tensor]:
    flat = {f"model.{name}": value for name, value in state["model"].items()}
    return flat | {f"{name}.{key}": v for name, entry in state["optim"]["state"].items() for key, v in entry.items()}


@pytest.mark.parametrize("interface", ["FSDP", "distributed.checkpoint"])
def test_full_state_continues_with_the_same_bits_here_and_in_one_process(interface: str):
    model = plain_model()
    optimizer = AdamW32bit(model.named_parameters(), lr=1e-2)
    train(model, optimizer, range(5))
    results = run_ranks(train_save_resume, 2, interface)
    for result in results:
        want = tensors(result["whole"])
        assert any(key.endswith("exp_avg_sq") for key in want)
        for key, value in tensors(result["resumed"]).items():
            assert_bitwise_equal(value, want[key], what=key)
        for name, value in model.state_dict().items():
            assert_bitwise_equal(result["whole"]["model"][name], value, what=name)
    # The way out: the full state, in one process or under FSDP2, in 8 bits.
    state = results[0]["after_three"]
    model.load_state_dict(state["model"])
    low_bit = AdamW8bit(model.named_parameters(), lr=1.0)
    low_bit.load_state_dict(convert_state(state["optim"], low_bit))
    assert low_bit.state[model[0].weight]["exp_avg_codes"].shape == (97, 130)
    assert low_bit.param_groups[0]["lr"] == 1e-2
    train(model, low_bit, range(3, 5))
    assert float(low_bit.state[model[0].weight]["step"]) == 5


def warnings_of_two_optimizers(rank: int, world_size: int, optimizer_class) -> dict:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model, optimizer = build(optimizer_class)
    train(model, optimizer, range(1))
    messages = [str(warning.message) for warning in caught if "FSDP1" in str(warning.message)]
    return {"messages": messages, "keys": [sorted(state) for state in optimizer.state.values()]}


def test_float32_state_is_said_once_with_what_to_do():
    for result in run_ranks(warnings_of_two_optimizers, 2, AdamW8bit):
        (message,) = result["messages"]
        assert message.startswith("AdamW8bit got parameters flattened by FSDP1")
        assert "Use FSDP2" in message
        assert all(keys == ["exp_avg", "exp_avg_sq", "step"] for keys in result["keys"])
    for result in run_ranks(warnings_of_two_optimizers, 2, AdamW32bit):
        assert not result["messages"]
