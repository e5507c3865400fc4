"""Float8 layers and AdamW8bit under FSDP2 on gloo: bit-equal to one process, saved and resharded."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aotrain.nn import Float8LinearConfig, convert_to_float8_training
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.optim import AdamW4bit, AdamW8bit, AdamWFp8, Lion8bit, Muon8bit
from aotrain.testing import assert_bitwise_equal
from tests.distributed.ranks import run_ranks

FULL = StateDictOptions(full_state_dict=True)
FORMATS = (AdamW8bit, AdamW4bit, AdamWFp8, Lion8bit)


def build(
    recipe: str, world_size: int, optimizer_class: type[torch.optim.Optimizer] = AdamW8bit
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """97 rows do not divide by 2 or 3 ranks, and rows of 130 do not divide by a block of 64.

    "recipe+gather" gathers codes.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 97), nn.ReLU(), nn.Linear(97, 130)).bfloat16()
    recipe, _, gather = recipe.partition("+")
    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=bool(gather))
    convert_to_float8_training(model, config=config)
    if world_size > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mp_policy=policy)
            layer.set_force_sum_reduction_for_comms(True)
            layer.set_gradient_divide_factor(1.0)
    return model, optimizer_class(model.parameters(), lr=1e-2, block_size=64, bf16_stochastic_round=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, world_size: int) -> None:
    for step in steps:
        x = torch.randn(16, 130, generator=torch.Generator().manual_seed(step)).bfloat16()
        # Gradients are summed over ranks and only rank 0 has any, so the sum is exactly the gradient of one process.
        share = 1.0 if world_size == 1 or dist.get_rank() == 0 else 0.0
        (model(x).float().square().mean() * share).backward()
        optimizer.step()
        optimizer.zero_grad()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    flat = {f"model.{name}": value for name, value in get_model_state_dict(model, options=FULL).items()}
    state = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    flat |= {f"optim.{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}
    # One process gets the live tensors; what is compared must not move with the next step.
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}


def train_and_save(rank: int, world_size: int, recipe: str, folder: str) -> dict:
    model, optimizer = build(recipe, world_size)
    train(model, optimizer, range(3), world_size)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    return full_state(model, optimizer)


def load_and_train(rank: int, world_size: int, recipe: str, folder: str) -> dict:
    model, optimizer = build(recipe, world_size)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    loaded = full_state(model, optimizer)
    train(model, optimizer, range(3, 5), world_size)
    return {"loaded": loaded, "final": full_state(model, optimizer)}


def broadcast_from_rank0(rank: int, world_size: int, path: str) -> dict:
    model, optimizer = build("rowwise", world_size)
    saved = torch.load(path, weights_only=True) if rank == 0 else {"model": {}, "optim": {}}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optim"], options=options)
    return full_state(model, optimizer)


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert_bitwise_equal(got[key], value, what=key)


@pytest.mark.parametrize(
    "recipe",
    [*(name.removeprefix("float8_") for name in FLOAT8_LINEAR_RECIPES), "tensorwise+gather", "blockwise+gather"],
)
def test_two_ranks_train_to_the_bits_of_one_process_and_reshard(tmp_path, recipe: str):
    model, optimizer = build(recipe, 1)
    train(model, optimizer, range(3), 1)
    after_three = full_state(model, optimizer)
    train(model, optimizer, range(3, 5), 1)
    after_five = full_state(model, optimizer)
    assert any(key.endswith("exp_avg_codes") for key in after_three)

    for state in run_ranks(train_and_save, 2, recipe, str(tmp_path)):
        assert_same(state, after_three)
    # One process more or less: rows move between ranks, values do not change.
    resumed = load_and_train(0, 1, recipe, str(tmp_path))
    assert_same(resumed["loaded"], after_three)
    assert_same(resumed["final"], after_five)


def save_every_format(rank: int, world_size: int, folder: str) -> None:
    for optimizer_class in FORMATS:
        model, optimizer = build("rowwise", world_size, optimizer_class)
        train(model, optimizer, range(2), world_size)
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{optimizer_class.__name__}-{world_size}")


def load_every_format(rank: int, world_size: int, folder: str) -> dict:
    loaded = {}
    for optimizer_class in FORMATS:
        for saved_by in range(1, 5):
            model, optimizer = build("rowwise", world_size, optimizer_class)
            state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
            dcp.load(state, checkpoint_id=f"{folder}/{optimizer_class.__name__}-{saved_by}")
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, state["optim"])
            loaded[f"{optimizer_class.__name__}-{saved_by}"] = full_state(model, optimizer)
    return loaded


def test_every_format_moves_between_one_to_four_ranks_bit_for_bit(tmp_path):
    """97 and 130 rows over 1 to 4 ranks, saved by each and loaded by each: always the state of one process."""
    want = {}
    for optimizer_class in FORMATS:
        model, optimizer = build("rowwise", 1, optimizer_class)
        train(model, optimizer, range(2), 1)
        want[optimizer_class.__name__] = full_state(model, optimizer)
    for world_size in range(1, 5):
        run_ranks(save_every_format, world_size, str(tmp_path))
    for world_size in range(1, 5):
        for loaded in run_ranks(load_every_format, world_size, str(tmp_path)):
            for name, state in loaded.items():
                assert_same(state, want[name.split("-")[0]])


def train_with_muon(rank: int, world_size: int) -> dict:
    model, _ = build("rowwise", world_size)
    optimizer = Muon8bit([model[0].weight, model[2].weight], lr=1e-2, block_size=64)
    for step in range(3):
        train(model, optimizer, range(step, step + 1), world_size)
    return {f"model.{name}": value.clone() for name, value in get_model_state_dict(model, options=FULL).items()}


def test_muon_orthogonalizes_the_whole_matrix():
    """97 and 130 rows over two ranks: an iteration on shards would give other weights."""
    want = train_with_muon(0, 1)
    for state in run_ranks(train_with_muon, 2):
        assert_same(state, want)


def test_full_state_dict_is_broadcast_from_rank_zero(tmp_path):
    model, optimizer = build("rowwise", 1)
    train(model, optimizer, range(3), 1)
    path = tmp_path / "full.pt"
    state = {
        "model": get_model_state_dict(model, options=FULL),
        "optim": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    torch.save(state, path)
    for result in run_ranks(broadcast_from_rank0, 2, str(path)):
        assert_same(result, full_state(model, optimizer))
