"""State of an offloaded optimizer: the file of the plain optimizer, exchanged in both directions and bit for bit."""

import copy

import pytest
import torch

from aotrain.testing import assert_bitwise_equal
from tests.optim.test_cpu_offload import (
    EVERY_CLASS,
    MODES,
    assert_same_state,
    assert_same_weights,
    groups_of,
    pair,
    train,
    twins,
)


def through_file(path, *parts: dict) -> list[dict]:
    torch.save(list(parts), path)
    return torch.load(path, weights_only=True)


@MODES
@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_by_one_continued_by_the_other(tmp_path, name: str, offload_gradients: bool, dtype):
    """Offloaded -> file -> plain, and plain -> file -> offloaded; both go on like a run that never stopped."""
    models, resumed = twins(dtype), twins(dtype)
    optimizers = pair(name, models, groups_of, offload_gradients=offload_gradients)
    others = pair(name, resumed, groups_of, offload_gradients=offload_gradients, lr=1.0)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3), micro=2)
    for index in range(2):
        saved = through_file(tmp_path / "x.pt", models[index].state_dict(), optimizers[index].state_dict())
        resumed[1 - index].load_state_dict(saved[0])
        others[1 - index].load_state_dict(saved[1])
    for pair_of_models, pair_of_optimizers in ((models, optimizers), (resumed, others)):
        for model, optimizer in zip(pair_of_models, pair_of_optimizers, strict=True):
            train(model, optimizer, range(3, 6), micro=2)
    assert_same_weights(resumed)
    assert_same_weights((resumed[0], models[1]))
    assert_same_state(others[0].state_dict(), optimizers[1].state_dict())
    assert_same_state(optimizers[0].state_dict(), others[1].state_dict())


def test_weights_loaded_after_the_optimizer_through_data_are_seen():
    models, resumed = twins(), twins()
    optimizers, others = pair("adamw", models), pair("adamw", resumed)
    train(resumed[0], others[0], range(2))
    train(models[0], optimizers[0], range(3))
    others[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for ours, theirs in zip(resumed[0].parameters(), models[0].parameters(), strict=True):
        ours.data.copy_(theirs.data)
    for model, optimizer in ((models[0], optimizers[0]), (resumed[0], others[0])):
        train(model, optimizer, range(3, 5))
    assert_same_weights((resumed[0], models[0]))


def test_state_is_reachable_by_parameter_and_groups_are_replaced():
    models = twins()
    optimizers = pair("adamw8bit", models)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0])
    weight = models[0][0].weight
    assert optimizers[0].state[weight].keys() == optimizers[1].state[models[1][0].weight].keys()
    saved = optimizers[1].state_dict()
    saved["param_groups"][0] |= {"lr": 0.25, "initial_lr": 0.5}
    optimizers[0].load_state_dict(saved)
    assert optimizers[0].param_groups[0]["lr"] == 0.25
    assert optimizers[0].param_groups[0]["initial_lr"] == 0.5
    assert optimizers[0].param_groups[0]["params"][0] is weight
    assert optimizers[0].state[weight]["exp_avg_codes"].dtype == torch.uint8


def test_how_to_compute_is_not_loaded():
    """A run on a GPU that saved capturable=True, or no fused kernel, does not make the offloaded one fail or slow."""
    models = twins()
    optimizer, plain = pair("adamw", models)
    train(models[1], plain, [0])
    saved = plain.state_dict()
    saved["param_groups"][0] |= {"fused": None, "foreach": True, "capturable": True}
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["capturable"]) == (True, None, False)


def test_state_dict_hooks_run():
    models = twins()
    optimizer, _ = pair("adamw8bit", models)
    train(models[0], optimizer, [0])
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state.pop("extra")))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1]


def other_shape(state: dict) -> None:
    for entry in state["state"].values():
        for key in entry.keys() & {"exp_avg", "exp_avg_scale"}:
            entry[key] = torch.zeros(3, 5)


def fewer_parameters(state: dict) -> None:
    state["param_groups"][0]["params"].pop()


def fewer_groups(state: dict) -> None:
    state["param_groups"].pop()


def per_parameter_format(state: dict) -> None:
    state |= {"offloaded": [state.pop("state")], "on-device": state.pop("param_groups")}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (other_shape, "want a"),
        (fewer_parameters, "groups of"),
        (fewer_groups, "groups of"),
        (per_parameter_format, "'state' and 'param_groups'"),
    ],
)
def test_a_load_that_fails_changes_nothing(name: str, damage, match: str):
    models = twins()
    optimizers = pair(name, models, groups_of)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    before = copy.deepcopy(optimizers[0].state_dict())
    damaged = copy.deepcopy(before)
    damaged["param_groups"][0]["lr"] = 123.0
    damage(damaged)
    with pytest.raises(ValueError, match=match):
        optimizers[0].load_state_dict(damaged)
    assert_same_state(optimizers[0].state_dict(), before)
    assert optimizers[0].param_groups[0]["lr"] == before["param_groups"][0]["lr"]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2, 4))
    assert_same_weights(models)


def test_saved_tensors_are_plain_and_on_the_host():
    models = twins()
    optimizer, _ = pair("adamw8bit", models)
    train(models[0], optimizer, [0])
    for entry in optimizer.state_dict()["state"].values():
        for value in entry.values():
            assert type(value) is torch.Tensor
            assert value.device.type == "cpu"
    clone = copy.deepcopy(optimizer.state_dict())
    assert_bitwise_equal(clone["state"][0]["exp_avg_codes"], optimizer.state_dict()["state"][0]["exp_avg_codes"])
