"""convert_to_float8_training and unconvert: what is swapped, what is kept, what is reported."""

import copy

import pytest
import torch
from torch import nn

from aotrain.nn import (
    Float8Linear,
    Float8LinearConfig,
    auto_filter_for_recipe,
    conversion_report,
    convert_to_float8_training,
    unconvert,
)
from aotrain.nn.float8_config import FLOAT8_LINEAR_RECIPES
from aotrain.recipes import RECIPES
from aotrain.testing import assert_bitwise_equal

ROWWISE = Float8LinearConfig.from_recipe_name("rowwise")


class Block(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(2)])
        self.lm_head = nn.Linear(dim, 50, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def not_head(module, fqn: str) -> bool:
    return fqn != "lm_head"


def test_swaps_in_place_and_keeps_parameters_and_names():
    model = Model()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert convert_to_float8_training(model, module_filter_fn=not_head, config=ROWWISE) is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model.blocks[0].up, Float8Linear)
    assert type(model.lm_head) is nn.Linear
    report = conversion_report(model)
    assert report.converted == ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    assert report.skipped == {"lm_head": "rejected by the filter"}
    assert "converted 4 layers, skipped 1 (1 rejected by the filter)" in str(report)


def test_trains_and_then_unconverts_to_the_same_weights():
    model = convert_to_float8_training(Model(), config=ROWWISE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, 50, (4, 16))
    losses = []
    for _ in range(30):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    weights = copy.deepcopy(model.state_dict())
    assert unconvert(model) is model
    assert not any(isinstance(module, Float8Linear) for module in model.modules())
    assert not any(attribute in vars(model.lm_head) for attribute in ("config", "recipe", "emulate"))
    for name, value in model.state_dict().items():
        assert_bitwise_equal(value, weights[name], what=name)


def test_hooks_training_flag_and_attributes_survive():
    model = Model().eval()
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append("hook"))
    model.lm_head.note = "kept"
    model.lm_head.weight.requires_grad_(False)
    convert_to_float8_training(model, config=ROWWISE)
    assert not model.lm_head.training
    assert model.lm_head.note == "kept"
    assert not model.lm_head.weight.requires_grad
    model(torch.zeros(1, 4, dtype=torch.long))
    assert calls == ["hook"]


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU())})
    convert_to_float8_training(model)
    assert isinstance(model["a"], Float8Linear)
    assert model["a"] is model["b"][0]


def test_root_linear_gives_a_new_module():
    linear = nn.Linear(16, 8)
    converted = convert_to_float8_training(linear)
    assert isinstance(converted, Float8Linear)
    assert converted.weight is linear.weight
    assert conversion_report(converted).converted == ("",)
    assert type(unconvert(converted)) is nn.Linear


def test_converting_twice():
    model = convert_to_float8_training(Model(), module_filter_fn=not_head, config=ROWWISE)
    layer = model.blocks[0].up
    convert_to_float8_training(model, module_filter_fn=not_head, config=ROWWISE)
    assert model.blocks[0].up is layer
    assert "already converted" in str(conversion_report(model))
    convert_to_float8_training(model, module_filter_fn=not_head)
    assert model.blocks[0].up.recipe == RECIPES["float8_tensorwise"]
    assert model.blocks[0].up.weight is layer.weight


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        convert_to_float8_training(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="rejected by the filter"):
        convert_to_float8_training(Model(), module_filter_fn=lambda module, fqn: fqn == "head")
    with pytest.raises(ValueError, match="was it converted"):
        unconvert(Model())
    with pytest.raises(ValueError, match="No conversion report"):
        conversion_report(Model())


def test_a_layer_with_its_own_forward_is_left_alone():
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Lora(16, 16), nn.Linear(16, 16))
    convert_to_float8_training(model)
    assert type(model[0]) is Lora
    assert conversion_report(model).skipped == {"0": "Lora has a forward of its own"}


def test_meta_model_materializes_after_conversion():
    with torch.device("meta"):
        model = Model()
    convert_to_float8_training(model, config=ROWWISE)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert bool(model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all())


def test_deepcopy_and_state_dict_round_trip():
    model = convert_to_float8_training(Model(), config=ROWWISE)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is not model.lm_head.weight
    plain = Model()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 8))
    assert_bitwise_equal(twin(tokens), model(tokens))
    assert_bitwise_equal(convert_to_float8_training(plain, config=ROWWISE)(tokens), model(tokens))


def test_subclass_with_a_second_base():
    class Base(nn.Module):
        def tag(self):
            return "base"

    class Mine(Float8Linear, Base):
        def __init__(self, size: int):
            super().__init__(size, size, bias=False, config=ROWWISE)

    layer = Mine(16)
    assert layer.tag() == "base"
    assert layer(torch.ones(2, 16)).shape == (2, 16)


def test_repr_names_the_formats():
    text = repr(Float8Linear(16, 16, config=Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")))
    assert "in_features=16" in text
    assert "grad_weight=(high precision)" in text
    assert "e4m3fn/fp32_pow2/rowwise" in text


@pytest.mark.parametrize("name", FLOAT8_LINEAR_RECIPES)
def test_compiled_equals_eager(name: str):
    """fullgraph: no graph break. relu has no rounding, so inductor's fusion cannot change the bits."""
    torch.compiler.reset()
    config = Float8LinearConfig.from_recipe_name(name)
    model = convert_to_float8_training(
        nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 17, bias=False)).bfloat16(), config=config
    )
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert_bitwise_equal(compiled, eager)


@pytest.mark.parametrize(
    ("recipe", "n", "k", "keep"),
    [
        ("tensorwise", 1024, 4096, False),
        ("tensorwise", 1040, 4096, True),
        ("tensorwise", 1024, 4112, True),
        ("rowwise", 2048, 8192, False),
        ("rowwise", 4096, 2048, False),
        ("rowwise", 4096, 4096, True),
        ("rowwise", 4097, 4096, False),
    ],
)
def test_auto_filter_thresholds(recipe: str, n: int, k: int, keep: bool):
    with torch.device("meta"):
        layer = nn.Linear(k, n)
    assert auto_filter_for_recipe(recipe, ["lm_head"])(layer, "blocks.0.up") is keep
    assert not auto_filter_for_recipe(recipe, ["lm_head"])(layer, "lm_head")


def test_auto_filter_judges_configuration_objects_and_refuses_unknown_recipes():
    class LinearConfig:
        in_features, out_features = 8192, 8192

    assert auto_filter_for_recipe("rowwise")(LinearConfig(), "w1")
    assert not auto_filter_for_recipe("rowwise")(nn.ReLU(), "act")
    with pytest.raises(NotImplementedError, match="Unsupported recipe"):
        auto_filter_for_recipe("rowwise_with_gw_hp")
    with pytest.raises(ValueError, match="Unknown recipe"):
        auto_filter_for_recipe("zz")
