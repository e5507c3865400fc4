"""Weights by name: the same for every sharding, different for every parameter and seed, same distribution."""

import pytest
import torch
import torch.nn as nn

from aotrain.integrations.torchtitan.models import llama3_spec
from aotrain.integrations.torchtitan.weight_init import NamedInit, name_parameter_inits


def weights(seed: int) -> dict[str, torch.Tensor]:
    model_config = llama3_spec("debug", "sdpa").model
    name_parameter_inits(model_config, seed)
    model = model_config.build()
    with torch.no_grad():
        model.init_states()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def test_the_global_generator_does_not_matter():
    first = weights(0)
    torch.manual_seed(99)
    second = weights(0)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    NamedInit(base=nn.init.normal_, name="w", seed=0)(nn.Parameter(torch.zeros(4, 4)))
    assert torch.equal(torch.rand(3), expected)


def test_every_layer_and_seed_has_its_own():
    drawn, other = weights(0), weights(1)
    random = {name for name in drawn if "norm" not in name}
    assert len({drawn[name].flatten()[:8].sum().item() for name in random}) == len(random)
    assert not any(torch.equal(drawn[name], other[name]) for name in random)


def test_standard_deviations_are_the_models_own():
    drawn = weights(0)
    assert drawn["tok_embeddings.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    assert drawn["layers.2.feed_forward.w1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["layers.3.feed_forward.w2.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert torch.equal(drawn["norm.weight"], torch.ones(128))


def test_tied_weights_stay_skipped():
    model_config = llama3_spec("1b", "sdpa").model
    skipped = model_config.tok_embeddings.param_init["weight"]
    name_parameter_inits(model_config, 0)
    assert model_config.tok_embeddings.param_init["weight"] is skipped
    assert isinstance(model_config.lm_head.param_init["weight"], NamedInit)


def test_naming_twice_changes_nothing():
    model_config = llama3_spec("debug", "sdpa").model
    assert name_parameter_inits(model_config, 0) > 0
    assert name_parameter_inits(model_config, 0) == 0
