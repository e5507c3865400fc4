"""Float8 by converter and by override: the same layers, the same losses; reports and mistakes."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.linear import Linear

import aotrain.nn
from aotrain.integrations.byte_tokenizer import byte_tokenizer_dir
from aotrain.integrations.torchtitan import build
from aotrain.integrations.torchtitan.build import build_config
from aotrain.integrations.torchtitan.converters import Float8Converter
from aotrain.integrations.torchtitan.linear import Float8Linear, NVFP4Linear, float8_linear_config
from aotrain.integrations.torchtitan.metrics_file import read_rows
from aotrain.integrations.torchtitan.models import llama3_spec
from aotrain.integrations.torchtitan.optim import EMBEDDING, optimizer_config, with_low_bit
from aotrain.integrations.torchtitan.train import _train, single_process_environment
from aotrain.nn.fsdp_weight import FsdpWeight
from aotrain.recipes import RECIPES

from .conftest import numbers

OVERRIDES = "aotrain.integrations.torchtitan.overrides"


def linears(model_config) -> dict[str, Linear.Config]:
    return {fqn: config for fqn, config, _, _ in model_config.traverse(Linear.Config)}


def test_all_but_the_skipped_layers_are_converted():
    model = llama3_spec("debug", "sdpa").model
    converter = Float8Converter.Config(
        recipe="float8_tensorwise", skip=["lm_head", "layers.0.*", "feed_forward.w2"]
    ).build()
    assert converter.convert(model) is model
    kinds = {fqn: type(config) for fqn, config in linears(model).items()}
    assert len(kinds) == 21
    skipped = {fqn for fqn, kind in kinds.items() if kind is Linear.Config}
    assert skipped == {"lm_head"} | {f for f in kinds if f.startswith("layers.0.")} | {
        f for f in kinds if f.endswith("w2")
    }
    report = converter.report
    assert set(report.skipped) == skipped
    assert set(report.converted) == set(kinds) - skipped
    assert report.skipped["lm_head"] == "matches skip 'lm_head'"


def test_the_layer_is_both_and_keeps_its_parameters():
    config = linears(llama3_spec("debug", "sdpa").model)["layers.0.feed_forward.w1"]
    new = float8_linear_config(config, recipe="float8_rowwise", emulate=True)
    assert new.param_init is config.param_init
    layer, plain = new.build(), config.build()
    assert isinstance(layer, aotrain.nn.Float8Linear)
    assert isinstance(layer, Linear)
    assert layer.recipe == RECIPES["float8_rowwise"]
    assert layer.emulate is True
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_what_our_own_linear_computes(recipe):
    layer = float8_linear_config(Linear.Config(in_features=48, out_features=33, bias=True), recipe=recipe).build()
    reference = aotrain.nn.Float8Linear(48, 33, bias=True, config=RECIPES[recipe])
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 48)
    for module in (layer, reference):
        module(x).sum().backward()
    assert torch.equal(layer(x), reference(x))
    assert torch.equal(layer.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("emulate", [False, True])
def test_nvfp4_computes_what_our_own_linear_computes(emulate):
    config = Linear.Config(in_features=48, out_features=33, bias=True)
    layer = float8_linear_config(config, recipe="nvfp4", emulate=emulate).build()
    assert isinstance(layer, NVFP4Linear)
    assert isinstance(layer, Linear)
    assert layer.config == aotrain.nn.NVFP4TrainingConfig(emulate=emulate)
    reference = aotrain.nn.NVFP4Linear(48, 33, True)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 48)
    for module in (layer, reference):
        module(x).sum().backward()
    assert torch.equal(layer(x), reference(x))
    assert torch.equal(layer.weight.grad, reference.weight.grad)


def test_nvfp4_layers_refuse_to_be_split():
    layer = float8_linear_config(Linear.Config(in_features=16, out_features=16), recipe="nvfp4").build()

    class Dims:
        tp_enabled = True

    with pytest.raises(NotImplementedError, match=r"want parallelism\.tp 1"):
        layer.parallelize(Dims())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["w9", "lm_head"]}, r"skip: 'w9' matches no linear layer; the model has lm_head, layers.0"),
        ({"skip": ["*"]}, r"recipe float8_rowwise: no layer was converted"),
        ({"recipe": "float8_colwise"}, r"Unknown recipe 'float8_colwise'; want one of .*, nvfp4"),
        ({"recipe": "nvfp4", "fsdp_float8_all_gather": True}, r"gather does not go with recipe nvfp4"),
    ],
    ids=["unused-skip", "nothing", "recipe", "nvfp4-gather"],
)
def test_a_conversion_without_effect_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Float8Converter.Config(**options).build().convert(llama3_spec("debug", "sdpa").model)


def test_converting_twice_changes_nothing_more():
    model = llama3_spec("debug", "sdpa").model
    Float8Converter.Config().build().convert(model)
    with pytest.raises(ValueError, match="no layer was converted"):
        Float8Converter.Config().build().convert(model)


def test_a_special_linear_is_left_alone():
    class Special(Linear):
        from dataclasses import dataclass

        @dataclass(kw_only=True, slots=True)
        class Config(Linear.Config):
            pass

    with pytest.raises(ValueError, match=r"it is not a plain Linear; leave this layer out"):
        float8_linear_config(Special.Config(in_features=16, out_features=16), recipe="float8_rowwise")


def test_override_and_converter_train_to_the_same_bits(train, tiny_job):
    by_converter = train(name="converter", config="llama3_debug_float8_rowwise_cpu")
    single_process_environment()
    job = tiny_job("optimizer.name=adamw", name="override")
    config = build_config(job, device_type="cpu", num_ranks=1, tokenizer_dir=byte_tokenizer_dir())
    config.override = OverrideConfig(
        imports=[(f"{OVERRIDES}.float8_linear", {"recipe": "rowwise"}), f"{OVERRIDES}.optimizer"]
    )
    _train(config)
    assert numbers(read_rows(Path(job.output_dir) / "metrics.jsonl")) == numbers(by_converter)


def test_every_override_finds_its_part_of_a_stock_config():
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    names = ["float8_linear", "optimizer", "sdpa", "metrics"]
    lines = apply_overrides(OverrideConfig(imports=[f"{OVERRIDES}.{name}" for name in names]), config)
    for name in names:
        assert any(f"{OVERRIDES}.{name}:" in line for line in lines), name
    converted = linears(config.model_spec.model)
    assert type(converted["lm_head"]) is Linear.Config
    assert all(type(c) is Float8Linear.Config for f, c in converted.items() if f != "lm_head")
    embedding, group = config.optimizer.param_groups
    assert embedding.optimizer_name == group.optimizer_name == "AdamW8bit"
    assert group.optimizer_kwargs["lr"] == 8e-4
    assert embedding.optimizer_kwargs == {**group.optimizer_kwargs, "bits": 32}


def test_low_bit_replacement_keeps_other_groups_and_names_mistakes():
    stock = default_adamw(lr=1e-3)
    muon = ParamGroupConfig(pattern="w1", optimizer_name="DistMuon", optimizer_kwargs={"lr": 1.0})
    mixed = with_low_bit(replace(stock, param_groups=[muon, *stock.param_groups]), "adamw_8bit")
    assert [group.optimizer_name for group in mixed.param_groups] == ["DistMuon", "AdamW8bit", "AdamW8bit"]
    assert [group.pattern for group in mixed.param_groups] == ["w1", EMBEDDING, ".*"]
    own = replace(stock, param_groups=[replace(muon, pattern="tok_embeddings"), *stock.param_groups])
    assert [group.pattern for group in with_low_bit(own, "adamw_8bit").param_groups] == ["tok_embeddings", ".*"]
    assert with_low_bit(stock, "adamw_torch_4bit").param_groups[0].optimizer_name == "AdamW4bit"
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; want one of adamw, adamw_8bit, "):
        with_low_bit(stock, "lion")
    with pytest.raises(ValueError, match=r"no Adam or AdamW parameter group to replace .* DistMuon"):
        with_low_bit(OptimizersContainer.Config(param_groups=[muon]), "adamw_8bit")


@pytest.mark.parametrize(
    ("keys", "patterns", "bits"),
    [
        ([], [EMBEDDING, ".*"], [32, None]),
        (["optimizer.embedding_bits=own"], [".*"], [None]),
        (["optimizer.embedding_bits=fp8"], [EMBEDDING, ".*"], ["fp8", None]),
        (
            ["optimizer.bits={'feed_forward': 4, 'tok_': 8}"],
            ["feed_forward", "tok_", EMBEDDING, ".*"],
            [4, 8, 32, None],
        ),
        (["optimizer.name=adamw"], [".*"], [None]),
    ],
)
def test_state_precision_by_name(tiny_job, keys, patterns, bits):
    config = optimizer_config(tiny_job(*keys).optimizer)
    assert [group.pattern for group in config.param_groups] == patterns
    assert [group.optimizer_kwargs.get("bits") for group in config.param_groups] == bits


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_codes_are_gathered_by_a_run_that_asks_for_it(train, monkeypatch, compiled):
    gathered = []
    original = FsdpWeight.fsdp_pre_all_gather

    def count(self, mesh, outer_size, outer_stride, module, mp_policy):
        result = original(self, mesh, outer_size, outer_stride, module, mp_policy)
        gathered.append((type(module), mp_policy.param_dtype, result[0][0].dtype))
        return result

    monkeypatch.setattr(FsdpWeight, "fsdp_pre_all_gather", count)
    # The trainer compiles with fullgraph=True; generating code takes most of the time and is not in question.
    monkeypatch.setattr(build, "CompileConfig", functools.partial(build.CompileConfig, backend="aot_eager"))
    options = ["precision.fsdp_float8_all_gather=true", f"training.compile={str(compiled).lower()}", "training.steps=1"]
    train(*options, config="llama3_debug_float8_rowwise_cpu")
    assert {tuple(others) for _, *others in gathered} == {(torch.bfloat16, torch.uint8)}
    assert all(issubclass(module, Float8Linear) for module, *_ in gathered)
