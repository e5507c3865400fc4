"""quantize_ with base configurations: which layers it converts, as which objects, and what it says of the others."""

import logging

import pytest
import torch
from torch import nn

from aotrain.nn import Float8Linear, conversion_report, convert_to_float8_training
from aotrain.quantization import (
    AOBaseConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_,
    scheme_of,
)
from tests.quantization.base_configs import BASE_CONFIGS, kind

INT4 = IntxWeightOnlyConfig(torch.int4, PerGroup(32))


class Model(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.block = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, width, bias=False))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.block(self.embed(tokens))))


def quantized(model: nn.Module) -> dict[str, type]:
    return {fqn: type(each) for fqn, each in model.named_modules() if hasattr(each, "scheme")}


@pytest.mark.parametrize("config", BASE_CONFIGS, ids=kind)
def test_linear_layers_become_quantized_ones(config: AOBaseConfig):
    model = Model(256)
    weights = {
        name: each.weight.detach().clone() for name, each in model.named_modules() if isinstance(each, nn.Linear)
    }
    assert quantize_(model, config) is None
    assert quantized(model) == dict.fromkeys(("block.0", "block.2", "head"), QuantizedLinear)
    scheme = scheme_of(config)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, scheme.weight.values(weight))
    assert model(torch.arange(6).reshape(2, 3)).shape == (2, 3, 20)
    assert conversion_report(model).title == type(config).__name__
    assert not any(name.endswith("0.weight") for name in model.state_dict())


def test_layers_stay_the_same_objects_with_their_hooks():
    model = Model()
    layer, calls = model.head, []
    model.register_module("also", layer)
    layer.register_forward_hook(lambda *_: calls.append(1))
    quantize_(model, INT4)
    assert model.head is model.also is layer
    model(torch.arange(3))
    assert calls == [1]


def test_the_model_may_itself_be_the_layer():
    layer = nn.Linear(64, 8, dtype=torch.bfloat16).eval()
    weight, bias = layer.weight, layer.bias
    quantize_(layer, INT4)
    assert type(layer) is QuantizedLinear
    assert layer.bias is bias
    assert not layer.training
    assert torch.equal(layer.weight, scheme_of(INT4).weight.values(weight))
    table = nn.Embedding(10, 32)
    quantize_(table, INT4, lambda module, fqn: True)
    assert type(table) is QuantizedEmbedding
    assert table(torch.arange(3)).shape == (3, 32)


def test_the_filter_names_layers_what_holds_them_and_embeddings():
    model = Model()
    quantize_(model, INT4, lambda module, fqn: isinstance(module, nn.Embedding))
    assert quantized(model) == {"embed": QuantizedEmbedding}
    quantize_(model, Int8WeightOnlyConfig(), lambda module, fqn: fqn == "block")
    assert quantized(model) == {"embed": QuantizedEmbedding, "block.0": QuantizedLinear, "block.2": QuantizedLinear}
    quantize_(model, INT4)
    assert model.block[0].scheme == scheme_of(Int8WeightOnlyConfig())
    assert conversion_report(model).converted == ("head",)
    assert "already quantized" in conversion_report(model).skipped["block.0"]
    with pytest.raises(ValueError, match=r"converts no layer; want at least one.*\n.*already quantized"):
        quantize_(model, INT4)


def test_layers_that_do_not_fit_are_left_alone_and_named(caplog):
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 40), nn.Linear(64, 8))
    with caplog.at_level(logging.WARNING):
        quantize_(model, Int4WeightOnlyConfig(32))
    assert quantized(model) == dict.fromkeys(("1", "2"), QuantizedLinear)
    assert "no multiple of the group size 32" in conversion_report(model).skipped["0"]
    assert "converted 2 layers, skipped 1" in caplog.text
    attention = nn.Sequential(nn.MultiheadAttention(64, 2), nn.Linear(64, 8))
    quantize_(attention, INT4)
    assert quantized(attention) == {"1": QuantizedLinear}
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)), nn.Linear(64, 8))
    quantize_(normed, INT4)
    assert quantized(normed) == {"1": QuantizedLinear}


def test_layers_of_training_in_float8_are_quantized_from_their_weights():
    model = convert_to_float8_training(nn.Sequential(nn.Linear(64, 32), nn.ReLU()))
    assert isinstance(model[0], Float8Linear)
    weight = model[0].weight.detach().clone()
    quantize_(model, INT4)
    assert torch.equal(model[0].weight, scheme_of(INT4).weight.values(weight))


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match="accepts no linear layer"):
        quantize_(Model(), INT4, lambda module, fqn: False)
    with pytest.raises(ValueError, match="an embedding has no activations"):
        quantize_(
            Model(), Int8DynamicActivationIntxWeightConfig(), lambda module, fqn: isinstance(module, nn.Embedding)
        )
    with pytest.raises(ValueError, match="no multiple of the group size 32"):
        quantize_(nn.Linear(40, 8), INT4)
    network = nn.Sequential(nn.Linear(32, 8))
    quantize_(network, INT4, device="meta")
    assert network[0].codes.device.type == "meta"


def test_no_setting_of_the_process_changes():
    from torch._inductor import config as inductor

    before = inductor.save_config_portable()
    quantize_(Model(), Int8WeightOnlyConfig(set_inductor_config=True))
    assert inductor.save_config_portable() == before


def test_state_is_loaded_into_a_model_without_weights():
    model, tokens = Model(), torch.arange(5)
    quantize_(model, INT4)
    with torch.device("meta"):
        other = Model()
    quantize_(other, INT4)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(tokens), model(tokens))


def test_quantized_models_equal_the_peers():
    peers = pytest.importorskip("torchao.quantization", reason="needs the [oracles] extra: pip install -e '.[oracles]'")
    torch.manual_seed(0)
    ours, theirs, tokens = Model(), Model(), torch.arange(6).reshape(2, 3)
    theirs.load_state_dict(ours.state_dict())
    quantize_(ours, Int8DynamicActivationIntxWeightConfig(torch.int4))
    peers.quantize_(theirs, peers.Int8DynamicActivationIntxWeightConfig(torch.int4))
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))
