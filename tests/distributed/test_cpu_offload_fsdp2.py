"""CPUOffloadOptimizer under FSDP2 on two gloo processes: the bits, the norm and the checkpoints of the plain run."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from aotrain.optim import AdamW8bit
from aotrain.optim.cpu_offload import CPUOffloadOptimizer
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

FULL = StateDictOptions(full_state_dict=True)
CLASSES = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamw8bit": (AdamW8bit, {"block_size": 64, "bf16_stochastic_round": True}),
}
CASES = [(name, host) for name in CLASSES for host in (False, True)]


def build(
    name: str, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = True, **offload: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """97 rows do not divide by two ranks; the last matrix has 4810 elements, so neither rank has 4096 of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 97), nn.ReLU(), nn.Linear(97, 130), nn.Linear(130, 37)).to(dtype)
    for layer in (model[0], model[2], model) if sharded else ():
        fully_shard(layer)
    cls, options = CLASSES[name]
    options = {**options, "lr": 1e-2}
    params = model.parameters()
    return model, CPUOffloadOptimizer(params, cls, **offload, **options) if offload else cls(params, **options)


def backward(model: nn.Module, seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(16, 130, generator=generator).to(next(model.parameters()).dtype)
    (model(x).float().square().mean() * 10).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    for step in steps:
        for micro in range(2):
            backward(model, 10 * step + micro, rank)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    flat = {f"model.{name}": value.clone() for name, value in get_model_state_dict(model, options=FULL).items()}
    state = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    return flat | {f"optim.{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}


def for_every_case(rank: int, world_size: int, function: Callable[..., dict], *args: Any) -> dict:
    """{case: what `function` returned}; one pair of processes for all cases, as starting them takes seconds."""
    return {f"{name}-{host}": function(rank, name, host, *args) for name, host in CASES}


def train_both(rank: int, name: str, host: bool) -> dict:
    result = {}
    for kind, offload in (("plain", {}), ("offload", {"offload_gradients": host, "staging_bytes": 1})):
        model, optimizer = build(name, **offload)
        if offload:
            # The last matrix has fewer than 4096 elements on each rank; what counts is the whole.
            result["offloaded"] = len(optimizer._offloaded)
        train(model, optimizer, range(3), rank)
        result[kind] = full_state(model, optimizer)
        sharded = get_optimizer_state_dict(model, optimizer)["state"]["3.weight"]
        result[f"{kind}_dtensors"] = [key for key, value in sharded.items() if isinstance(value, DTensor)]
    return result


def save_and_exchange(rank: int, name: str, host: bool, folder: str) -> dict:
    """Train 2 steps, save through DCP, load into the other kind, train 2 more steps; as does the uninterrupted run."""
    result = {}
    kinds = {"plain": {}, "offload": {"offload_gradients": host, "minimal_size": 100}}
    for kind, offload in kinds.items():
        model, optimizer = build(name, **offload)
        train(model, optimizer, range(2), rank)
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{kind}-{name}-{host}")
        train(model, optimizer, range(2, 4), rank)
        result[f"{kind}.uninterrupted"] = full_state(model, optimizer)
    for saved, kind in (("plain", "offload"), ("offload", "plain")):
        model, optimizer = build(name, **kinds[kind])
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{saved}-{name}-{host}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optim"])
        # The scheduler starts anew from its initial rate, as it did in the uninterrupted run.
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        train(model, optimizer, range(2, 4), rank)
        result[f"{kind}.resumed"] = full_state(model, optimizer)
    return result


def clip_both(rank: int, name: str, host: bool) -> dict:
    result = {}
    for kind, offload in (("plain", {}), ("offload", {"offload_gradients": host})):
        model, optimizer = build(name, torch.float32, **offload)
        norms = []
        for norm_type in (2.0, math.inf):
            backward(model, 0, rank)
            if offload:
                norm = optimizer.clip_grad_norm_(0.5, norm_type)
            else:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type).full_tensor()
            optimizer.step()
            optimizer.zero_grad()
            norms.append(norm.item())
        result[kind] = {"norms": torch.tensor(norms, dtype=torch.float64)} | full_state(model, optimizer)
    return result


def broadcast_into_offloaded(rank: int, world_size: int, path: str) -> dict:
    saved = torch.load(path, weights_only=True) if rank == 0 else {"model": {}, "optim": {}}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model, optimizer = build("adamw8bit", offload_gradients=True)
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optim"], options=options)
    return full_state(model, optimizer)


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert_bitwise_equal(got[key], value, what=key)


def test_two_ranks_train_to_the_bits_of_the_plain_run():
    for results in run_ranks(for_every_case, 2, train_both):
        for result in results.values():
            assert result["offloaded"] == 3
            assert_same(result["offload"], result["plain"])
            assert result["offload_dtensors"] == result["plain_dtensors"] != []


def test_checkpoints_are_exchanged_with_the_plain_run(tmp_path):
    for results in run_ranks(for_every_case, 2, save_and_exchange, str(tmp_path)):
        for result in results.values():
            assert_same(result["offload.uninterrupted"], result["plain.uninterrupted"])
            assert_same(result["offload.resumed"], result["plain.uninterrupted"])
            assert_same(result["plain.resumed"], result["plain.uninterrupted"])


def test_the_norm_is_that_of_all_ranks():
    """The factors differ by float32 rounding; 8-bit codes may then differ, so only weights are compared."""
    first, second = run_ranks(for_every_case, 2, clip_both)
    for case, result in first.items():
        assert_same(result["offload"], second[case]["offload"])
        torch.testing.assert_close(result["offload"]["norms"], result["plain"]["norms"], rtol=1e-6, atol=0.0)
        for key, value in result["plain"].items():
            if key.startswith("model."):
                torch.testing.assert_close(result["offload"][key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_a_full_state_dict_is_broadcast_into_offloaded_ranks(tmp_path):
    """Saved by one process that does not offload, read by rank 0 only."""
    model, optimizer = build("adamw8bit", sharded=False)
    train(model, optimizer, range(2), 0)
    saved = {
        "model": get_model_state_dict(model, options=FULL),
        "optim": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    torch.save(saved, tmp_path / "full.pt")
    for result in run_ranks(broadcast_into_offloaded, 2, str(tmp_path / "full.pt")):
        assert_same(result, full_state(model, optimizer))
