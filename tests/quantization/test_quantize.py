"""quantize_ with the configurations of training: what it converts, and what it refuses."""

import pytest
import torch
from torch import nn

import aotrain.quantization.quantize as module
from aotrain.nn import Float8Linear, Float8LinearConfig, Float8TrainingOpConfig, MXFP8TrainingOpConfig, MXLinear
from aotrain.nn.experts import expert_scaling
from aotrain.nn.mx_config import MXLinearConfig
from aotrain.quantization import quantize_, register_quantize_handler
from aotrain.recipes import RECIPES
from tests.nn.experts import Experts, MoE


def model() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 4))


def kinds(network: nn.Module) -> list[type]:
    return [type(layer) for layer in network.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("config", "cls", "recipe"),
    [
        (MXFP8TrainingOpConfig(wgrad_with_hp=True), MXLinear, "mxfp8_gw_hp"),
        (MXLinearConfig(recipe="mxfp4"), MXLinear, "mxfp4"),
        (Float8TrainingOpConfig(), Float8Linear, "float8_rowwise"),
        (Float8LinearConfig(), Float8Linear, "float8_tensorwise"),
    ],
)
def test_training_configurations_swap_linear_layers_in_place(config, cls, recipe):
    network = model()
    parameters = list(network.parameters())
    assert quantize_(network, config) is None
    assert kinds(network) == [cls] * 3
    assert network[1].recipe == RECIPES[recipe]
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    network(torch.randn(3, 8)).sum().backward()


def test_the_filter_names_layers_or_what_holds_them():
    network = model()
    quantize_(network, MXFP8TrainingOpConfig(), filter_fn=lambda mod, fqn: fqn == "0")
    assert kinds(network) == [MXLinear, MXLinear, nn.Linear]
    network = model()
    quantize_(network, MXFP8TrainingOpConfig(), filter_fn=lambda mod, fqn: isinstance(mod, nn.Linear) and fqn != "1")
    assert kinds(network) == [MXLinear, MXLinear, nn.Linear]


@pytest.mark.parametrize(
    ("config", "recipe"), [(MXFP8TrainingOpConfig(), "mxfp8"), (Float8TrainingOpConfig(), "float8_rowwise")]
)
def test_experts_that_the_filter_accepts_are_converted(config, recipe):
    network = MoE(Experts())
    quantize_(network, config, filter_fn=lambda mod, fqn: isinstance(mod, Experts))
    assert expert_scaling(network.experts).recipe == RECIPES[recipe]
    assert kinds(network) == [nn.Linear] * 2
    quantize_(network.experts, config, filter_fn=lambda mod, fqn: isinstance(mod, Experts))  # itself
    network = MoE(Experts())
    quantize_(network, config, filter_fn=lambda mod, fqn: fqn in ("experts", "lm_head"))
    assert expert_scaling(network.experts) is not None
    assert [kind is nn.Linear for kind in kinds(network)] == [True, False]
    network = MoE(Experts())
    quantize_(network, config)
    assert expert_scaling(network.experts) is None


def test_the_model_moves_first():
    network = model()
    quantize_(network, MXFP8TrainingOpConfig(), device="meta")
    assert {param.device.type for param in network.parameters()} == {"meta"}


def test_what_cannot_be_done_is_an_error():
    with pytest.raises(ValueError, match="converted none"):
        quantize_(model(), MXFP8TrainingOpConfig(), filter_fn=lambda *_: False)
    with pytest.raises(ValueError, match="return the new layer"):
        quantize_(nn.Linear(2, 2), MXFP8TrainingOpConfig())
    with pytest.raises(
        TypeError, match=r"want a configuration: .*Float8LinearConfig, Float8TrainingOpConfig, .*MXFP8Tr"
    ):
        quantize_(model(), lambda layer: layer)


def test_other_configurations_bring_a_handler(monkeypatch):
    monkeypatch.setattr(module, "_HANDLERS", dict(module._HANDLERS))
    seen = []

    class Config:
        pass

    @register_quantize_handler(Config)
    def handler(network, config, filter_fn) -> None:
        seen.append([fqn for fqn, each in network.named_modules() if filter_fn(each, fqn)])

    quantize_(model(), Config(), lambda _, fqn: fqn.startswith("0."))
    assert seen == [["0.0", "0.1", "0.2"]]
