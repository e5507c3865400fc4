"""Experts in low precision by converter and by override: the same modules, what is left alone, and mistakes."""

from dataclasses import dataclass

import pytest
import torch
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.overrides.fused_swiglu import FusedGroupedExperts

from aotrain.integrations.torchtitan.converters import Float8Converter
from aotrain.integrations.torchtitan.experts import experts_class, experts_config
from aotrain.integrations.torchtitan.linear import Float8Linear
from aotrain.integrations.torchtitan.models import llama3_spec, model_spec
from aotrain.nn import convert_moe_training
from aotrain.testing import assert_bitwise_equal

OVERRIDES = "aotrain.integrations.torchtitan.overrides"
KINDS = [GroupedExperts, GptOssGroupedExperts]


def small(kind: type[GroupedExperts]) -> GroupedExperts.Config:
    return kind.Config(dim=32, hidden_dim=48, num_experts=4)


def filled(config: GroupedExperts.Config) -> GroupedExperts:
    experts = config.build()
    with torch.no_grad():
        for index, parameter in enumerate(experts.parameters()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    return experts


def train_once(experts: GroupedExperts) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(20, 32, generator=generator).bfloat16().requires_grad_()
    out = experts(x, torch.tensor([3, 0, 8, 9]))
    out.backward(torch.randn(20, 32, generator=generator).bfloat16())
    return [out.detach(), x.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.parametrize("recipe", ["float8_rowwise", "float8_blockwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_ours_computes_what_conversion_of_a_module_does(kind: type[GroupedExperts], recipe: str):
    plain = filled(small(kind))
    ours = filled(experts_config(small(kind), recipe=recipe))
    assert isinstance(ours, kind)
    assert type(ours).__name__ == f"LowPrecision{kind.__name__}"
    assert ours.state_dict().keys() == plain.state_dict().keys()
    unconverted, got = train_once(plain), train_once(ours)
    plain.zero_grad()
    for a, b, c in zip(got, train_once(convert_moe_training(plain, recipe)), unconverted, strict=True):
        assert_bitwise_equal(a, b)
        assert a.shape == c.shape
    assert not torch.equal(got[0], unconverted[0])


def test_other_fields_of_the_config_are_carried_over():
    config = GptOssGroupedExperts.Config(dim=32, hidden_dim=48, num_experts=4, swiglu_limit=3.0, param_init={})
    new = experts_config(config, recipe="rowwise", emulate=True)
    assert (new.swiglu_limit, new.recipe, new.emulate, new.dim) == (3.0, "rowwise", True, 32)
    assert new.param_init is config.param_init
    assert new.build().swiglu_limit == 3.0
    fused = experts_config(FusedGroupedExperts.Config(dim=32, hidden_dim=48, num_experts=4), recipe="rowwise")
    assert issubclass(experts_class(fused), FusedGroupedExperts)


class Special(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def _grouped_mm(self, *, A, B_t, offs):
        return A


def test_experts_with_products_of_their_own_are_left_alone():
    with pytest.raises(ValueError, match="cannot replace Special: it multiplies in a way of its own"):
        experts_config(small(Special), recipe="float8_rowwise")
    with pytest.raises(ValueError, match="Unknown recipe 'float9'"):
        experts_config(small(GroupedExperts), recipe="float9")
    model = model_spec("deepseek_v3", "debug", "sdpa").model
    model.layers[1].moe.routed_experts.inner_experts = small(Special)
    report = Float8Converter.Config(recipe=None, experts="float8_rowwise").build()
    report.convert(model)
    assert report.report.skipped == {
        "layers.1.moe.routed_experts.inner_experts": "Special multiplies in a way of its own"
    }


def kinds_of(model: object) -> dict[str, str]:
    return {
        fqn: type(node).__qualname__
        for kind in (Linear.Config, GroupedExperts.Config)
        for fqn, node, _, _ in model.traverse(kind)
    }


def test_the_converter_converts_layers_and_experts_but_no_gate():
    model = model_spec("deepseek_v3", "debug", "sdpa").model
    before = kinds_of(model)
    converter = Float8Converter.Config(experts="float8_blockwise", skip=["lm_head", "layers.3."]).build()
    assert converter.convert(model) is model
    after = kinds_of(model)
    changed = {fqn for fqn in before if before[fqn] != after[fqn]}
    assert changed == {fqn for fqn in before if "gate" not in fqn and fqn != "lm_head" and "layers.3." not in fqn}
    assert {node.recipe for _, node, _, _ in model.traverse(Float8Linear.Config)} == {"float8_rowwise"}
    assert model.layers[1].moe.routed_experts.inner_experts.recipe == "float8_blockwise"
    assert set(converter.report.converted) == changed
    assert converter.report.skipped["layers.1.moe.router.gate"] == "the gate of a router"
    assert converter.report.skipped["layers.3.moe.routed_experts.inner_experts"] == "matches skip 'layers.3.'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "rowwise", "skip": ["w9"]}, r"skip: 'w9' matches no linear or experts layer; the model has lm_"),
        ({"experts": "rowwise", "skip": ["experts"]}, r"experts rowwise: no layer was converted"),
        ({"experts": "float9"}, r"Unknown recipe 'float9'; want one of"),
        ({"recipe": None}, r"recipe and experts are both None: there is nothing to convert"),
    ],
    ids=["unused-skip", "nothing", "recipe", "none"],
)
def test_a_conversion_without_effect_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Float8Converter.Config(**options).build().convert(model_spec("deepseek_v3", "debug", "sdpa").model)


def test_a_model_without_experts_is_an_error():
    with pytest.raises(ValueError, match="experts float8_rowwise: the model has no such layers; set it to null"):
        Float8Converter.Config(experts="float8_rowwise").build().convert(llama3_spec("debug", "sdpa").model)


@pytest.mark.parametrize(
    ("family", "function"),
    [("deepseek_v3", "deepseek_v3_debugmodel"), ("qwen3", "qwen3_moe_debug"), ("gpt_oss", "gpt_oss_debugmodel")],
)
def test_overrides_find_the_experts_of_stock_configs_and_leave_gates(family: str, function: str):
    import importlib

    config = getattr(importlib.import_module(f"torchtitan.models.{family}.config_registry"), function)()
    apply_overrides(
        OverrideConfig(imports=[f"{OVERRIDES}.float8_linear", (f"{OVERRIDES}.experts", {"recipe": "blockwise"})]),
        config,
    )
    model = config.model_spec.model
    found = kinds_of(model)
    experts = {fqn: kind for fqn, kind in found.items() if "inner_experts" in fqn}
    assert experts
    assert {node.recipe for _, node, _, _ in model.traverse(GroupedExperts.Config)} == {"blockwise"}
    assert all(
        (kind == "Linear.Config") == ("gate" in fqn)
        for fqn, kind in found.items()
        if "layers" in fqn and "experts" not in fqn and "Scaled" not in kind
    )
