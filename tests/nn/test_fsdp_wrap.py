"""Weights that FSDP2 will gather as codes, before there is any FSDP2: ordinary in every other way."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from aotrain.nn import Float8Linear, Float8LinearConfig, convert_to_float8_training, unconvert
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.nn.fsdp_weight import FsdpWeight
from aotrain.optim import AdamW8bit
from aotrain.testing import assert_bitwise_equal


def config(recipe: str = "tensorwise") -> Float8LinearConfig:
    return replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW8bit])
def test_training_on_one_process_is_unchanged(name: str, optimizer_class: type[torch.optim.Optimizer]):
    plain = nn.Sequential(nn.Linear(80, 96), nn.Tanh(), nn.Linear(96, 80))
    models = [copy.deepcopy(plain), copy.deepcopy(plain)]
    for model, gather in zip(models, (False, True), strict=True):
        convert_to_float8_training(
            model, config=replace(Float8LinearConfig.from_recipe_name(name), enable_fsdp_float8_all_gather=gather)
        )
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        for seed in range(3):
            x = torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert isinstance(models[1][0].weight, FsdpWeight)
    assert isinstance(models[1][0].weight, nn.Parameter)
    for got, want in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert_bitwise_equal(got.detach(), want.detach())
    for other in (copy.deepcopy(models[1]), pickle.loads(pickle.dumps(models[1]))):
        assert isinstance(other[0].weight, FsdpWeight)
        assert other[0].weight.requires_grad
        assert other[0].weight.data_ptr() != models[1][0].weight.data_ptr()
        assert_bitwise_equal(other[0].weight.detach(), models[0][0].weight.detach())


def test_state_dict_and_files_hold_ordinary_tensors():
    model = convert_to_float8_training(nn.Sequential(nn.Linear(4, 6)), config=config())
    state = model.state_dict()
    assert type(state["0.weight"]) is torch.Tensor
    assert state["0.weight"].data_ptr() == model[0].weight.data_ptr()
    file = io.BytesIO()
    torch.save([state, list(model.parameters())], file)
    file.seek(0)
    loaded, parameters = torch.load(file, weights_only=True)
    assert type(loaded["0.weight"]) is torch.Tensor
    assert type(parameters[0]) is nn.Parameter
    for assign in (False, True):
        model.load_state_dict({key: value + 1 for key, value in loaded.items()}, assign=assign)
        assert isinstance(model[0].weight, FsdpWeight)
        assert_bitwise_equal(model[0].weight.detach(), parameters[0].detach() + 1)


def test_unconvert_gives_ordinary_parameters_back():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    model[0].weight.requires_grad_(False)
    before = [param.detach().clone() for param in model.parameters()]
    unconvert(convert_to_float8_training(model, config=config()))
    assert [type(param) for param in model.parameters()] == [nn.Parameter] * 4
    assert [param.requires_grad for param in model.parameters()] == [False, True, True, True]
    for param, want in zip(model.parameters(), before, strict=True):
        assert_bitwise_equal(param.detach(), want)
    assert not hasattr(model[0], "fsdp_planes")


def test_a_weight_tied_to_an_embedding_stays_tied_and_ordinary(caplog: pytest.LogCaptureFixture):
    model = convert_to_float8_training(Tied(), config=config())
    assert model.head.weight is model.embedding.weight
    assert type(model.head.weight) is nn.Parameter
    assert isinstance(model.hidden.weight, FsdpWeight)
    assert "gathers it in high precision" in caplog.text
    model.load_state_dict(model.state_dict())
    copied = pickle.loads(pickle.dumps(model))
    assert copied.head.weight is copied.embedding.weight
    assert type(copied.head.weight) is nn.Parameter


def test_converting_again_changes_what_is_gathered():
    model = convert_to_float8_training(nn.Sequential(nn.Linear(4, 6)), config=config())
    convert_to_float8_training(model, config=config("rowwise"))
    assert len(model[0].weight.planes.distinct) == 2
    convert_to_float8_training(model, config=Float8LinearConfig())
    assert type(model[0].weight) is nn.Parameter


def test_layers_that_share_a_weight_keep_sharing_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    convert_to_float8_training(model, config=config())
    assert isinstance(model[0].weight, FsdpWeight)
    assert model[0].weight is model[1].weight
    unconvert(model)
    assert type(model[0].weight) is nn.Parameter
    assert model[0].weight is model[1].weight


def test_a_single_layer_and_meta_devices():
    layer = Float8Linear(8, 4, config=config(), device="meta")
    assert isinstance(layer.weight, FsdpWeight)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    nn.init.ones_(layer.weight)
    assert isinstance(layer.weight, FsdpWeight)
    assert layer.weight.device.type == "cpu"
    assert layer(torch.ones(1, 8)).shape == (1, 4)
    assert isinstance(layer.bfloat16().weight, FsdpWeight)
    assert isinstance(Float8Linear.from_float(nn.Linear(4, 4), config()).weight, FsdpWeight)
