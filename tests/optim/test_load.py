"""Saving and loading optimizer state: files, exact resume, and every way to get it wrong."""

import copy
import math

import pytest
import torch
from torch import nn

from aotrain.optim import AdamW4bit, AdamW8bit, AdamWFp8, Lion8bit
from aotrain.testing import assert_bitwise_equal


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 70)).to(dtype)
    optimizer = AdamW8bit(model.parameters(), **options)
    run(model, optimizer, range(steps))
    return model, optimizer


def run(model, optimizer, seeds) -> None:
    for seed in seeds:
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_from_a_file_is_bit_exact(tmp_path, dtype):
    options = {"bf16_stochastic_round": True, "amsgrad": True, "seed": 3}
    model, optimizer = trained(dtype=dtype, **options)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    resumed, fresh = trained(steps=0, dtype=dtype)
    saved = torch.load(path, weights_only=True)
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.param_groups[0]["seed"] == 3
    for pair in ((model, optimizer), (resumed, fresh)):
        run(*pair, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(b.detach(), a.detach())


def test_state_keeps_its_dtypes_and_is_a_copy():
    _, optimizer = trained(dtype=torch.bfloat16)
    saved = optimizer.state_dict()
    _, fresh = trained(steps=0, dtype=torch.bfloat16)
    fresh.load_state_dict(saved)
    for index, entry in saved["state"].items():
        for key, value in entry.items():
            loaded = fresh.state_dict()["state"][index][key]
            assert loaded.dtype == value.dtype
            assert loaded.data_ptr() != value.data_ptr()
            assert_bitwise_equal(loaded, value)
    assert {value.dtype for value in saved["state"][0].values()} == {torch.uint8, torch.float32}


def corrupt(state_dict, **changes):
    state_dict = copy.deepcopy(state_dict)
    entry = state_dict["state"][0]
    for key, change in changes.items():
        entry[key] = change(entry[key])
    return state_dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: corrupt(sd, exp_avg_codes=lambda t: t[:-1]), r"exp_avg_codes of parameter 0.*\(95, 128\).*want"),
        (lambda sd: corrupt(sd, exp_avg_codes=lambda t: t.float()), "dtype torch.float32, want"),
        (lambda sd: corrupt(sd, exp_avg_sq_scale=lambda t: t.repeat(1, 2)), "another block_size"),
        (
            lambda sd: corrupt(sd, exp_avg_sq_scale=lambda t: t.index_fill(0, torch.tensor(3), math.nan)),
            "exp_avg_sq_scale of parameter 0 .*1 NaN",
        ),
        (lambda sd: corrupt(sd, step=lambda t: t * math.inf), "step of parameter 0 .*infinite"),
        (lambda sd: sd["state"][0].pop("exp_avg_scale") is None or sd, "has keys"),
        (lambda sd: {**sd, "param_groups": [{**sd["param_groups"][0], "params": [0, 1]}]}, "has 2 parameters"),
    ],
    ids=["truncated", "dtype", "scale", "NaN scale", "infinite step", "missing key", "fewer parameters"],
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, message: str):
    _, optimizer = trained()
    _, target = trained(steps=2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(change(copy.deepcopy(optimizer.state_dict())))
    after = target.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert_bitwise_equal(after["state"][index][key], value)


def test_state_of_torch_adamw_is_refused_by_name():
    model, _ = trained()
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    theirs = torch.optim.AdamW(model.parameters())
    run(model, theirs, range(1))
    ours = AdamW8bit([{"params": list(model.parameters()), "param_names": names}])
    with pytest.raises(ValueError, match=r"parameter '0.weight' has keys \['exp_avg', 'exp_avg_sq', 'step'\]"):
        ours.load_state_dict(theirs.state_dict())


def test_saved_block_size_wins_over_the_current_one():
    _, optimizer = trained(block_size=32)
    _, other = trained(steps=0, block_size=256)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["block_size"] == 32
    assert other.state_dict()["state"][0]["exp_avg_scale"].shape == (96, 4)


def test_state_is_plain_tensors_that_safetensors_takes(tmp_path):
    from safetensors.torch import load_file, save_file

    for cls in (AdamW8bit, AdamW4bit, AdamWFp8, Lion8bit):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 70)).bfloat16()
        optimizer = cls(model.parameters())
        run(model, optimizer, range(2))
        saved = optimizer.state_dict()
        flat = {f"{index}.{key}": value for index, entry in saved["state"].items() for key, value in entry.items()}
        assert all(type(value) is torch.Tensor for value in flat.values())
        path = tmp_path / f"{cls.__name__}.safetensors"
        save_file(flat, path)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(path).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        fresh = cls(copy.deepcopy(model).parameters())
        fresh.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        for index, entry in saved["state"].items():
            for key, value in entry.items():
                assert_bitwise_equal(fresh.state_dict()["state"][index][key], value)
