"""LoRA with QAT through peft: training sees the weight that merging and quantizing give, bit for bit."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="needs the [hf] extra: pip install -e '.[hf]'")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from aotrain.integrations.huggingface.peft import QATLoraLinear, qat_lora_config, unseen_linears
from aotrain.ops.fake_quantized_lora import merged_weight
from aotrain.qat import IntxFakeQuantizeConfig, QATConfig, QATSchedule
from aotrain.qat.fake_quantizer import FakeQuantizerBase, fake_quantizer_of
from aotrain.qat.fused_scales import share_global_scales
from aotrain.quantization import get_scheme, quantize_
from aotrain.quantization.fused_groups import shared_global_scale
from aotrain.quantization.schemes import Nvfp4Scheme, TensorScheme
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface.tiny import tiny_llama

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))


def settings(**changed) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changed)


def adapted(scheme: str = "int4-g32", dtype: torch.dtype = torch.float32, **changed) -> PeftModel:
    """With adapters that change something: B begins as zeros."""
    model = get_peft_model(tiny_llama().to(dtype), qat_lora_config(settings(**changed), scheme))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def layers(model: torch.nn.Module) -> list[QATLoraLinear]:
    return [module for module in model.modules() if isinstance(module, QATLoraLinear)]


class Recorder:
    """A scheme that keeps the last values that it gave."""

    def __init__(self, scheme: TensorScheme) -> None:
        self.scheme = scheme

    def values(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.scheme.values(x)
        return self.last


def seen_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each adapted layer multiplied by in a forward pass, by the layer's name in the base model."""
    recorders = {}
    for name, module in model.named_modules():
        if isinstance(module, QATLoraLinear):
            quantizer = module.weight_fake_quantizer
            quantizer.scheme = recorders[name.removeprefix("base_model.model.")] = Recorder(quantizer.scheme)
    with torch.no_grad():
        model(input_ids=TOKENS)
    return {name: recorder.last for name, recorder in recorders.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int2-g32", "int4-g32", "fp8-weight-only", "nvfp4", "q4_0"])
@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe"])
def test_merging_and_quantizing_gives_what_training_saw(scheme: str, dtype: torch.dtype, safe_merge: bool, tmp_path):
    model = adapted(scheme, dtype)
    assert {module.lora_B["default"].weight.dtype for module in layers(model)} == {torch.float32}
    before = tiny_llama().to(dtype).state_dict()
    seen = seen_weights(model)
    assert len(seen) == len(TARGETS)
    model.merge_and_unload(safe_merge=safe_merge).save_pretrained(tmp_path)
    served = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, weight in seen.items():
        merged = served[f"{name}.weight"]
        assert not torch.equal(merged, before[f"{name}.weight"])
        assert_bitwise_equal(get_scheme(scheme).weight.values(merged), weight, what=name)


def test_adapters_of_the_models_dtype_are_merged_in_float32():
    model = get_peft_model(
        tiny_llama().bfloat16(), qat_lora_config(settings(), "int4-g32"), autocast_adapter_dtype=False
    )
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        assert layer.lora_B["default"].weight.dtype == torch.bfloat16
    seen = seen_weights(model)
    merged = model.merge_and_unload().state_dict()
    for name, weight in seen.items():
        assert torch.equal(get_scheme("int4-g32").weight.values(merged[f"{name}.weight"]), weight)


def test_the_merged_model_computes_what_the_adapted_one_did():
    model = adapted("int4-g32-a8")
    before = loss(model)
    model.merge_adapter()
    assert torch.equal(loss(model), before)
    with model.disable_adapter():  # unmerges, as peft does
        reference = loss(model)
    assert abs(reference - loss(tiny_llama().train())) < 1e-5
    assert not torch.equal(before, reference)


def test_training_moves_the_adapters_only_and_learns():
    model = adapted("int2-g32")
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(loss(model))
        losses[-1].backward()
        assert all(each.grad is not None for name, each in model.named_parameters() if "lora_" in name)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(dict(model.named_parameters())[name], each) for name, each in frozen.items())


def test_adapters_save_and_load(tmp_path):
    model = adapted()
    keys = set(get_peft_model(tiny_llama(), settings()).state_dict())
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=qat_lora_config(saved, "int4-g32"))
    assert len(layers(again)) == len(layers(model))
    assert torch.equal(loss(again.train()), loss(model))


def test_fake_quantizers_have_switches():
    model = adapted("int4-g32-a8")
    quantized = loss(model)
    layer = layers(model)[0]
    QATSchedule(start_step=1).apply(model, 0)
    assert not layer.weight_fake_quantizer.enabled
    assert not layer.activation_fake_quantizer.enabled
    plain = loss(model)
    assert not torch.equal(plain, quantized)
    merged = merged_weight(layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, merged))
    for each in layers(model):
        each.weight_fake_quantizer.enabled = each.activation_fake_quantizer.enabled = True
    assert torch.equal(loss(model), quantized)


class Prepared(torch.nn.Linear):
    """As `prepare_qat` leaves a layer: a linear layer with fake quantizers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight_fake_quantizer(self.weight), self.bias)


def prepared_llama(scheme: str) -> LlamaForCausalLM:
    model = tiny_llama()
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Prepared
            module.weight_fake_quantizer = fake_quantizer_of(get_scheme(scheme).weight)
            module.activation_fake_quantizer = None
            assert name
    return model


def test_prepared_layers_bring_their_scheme():
    model = get_peft_model(prepared_llama("int2-g32"), qat_lora_config(settings(modules_to_save=["o_proj"])))
    assert unseen_linears(model) == []
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizerBase)]
    assert len(quantizers) == 8  # one per layer, and that of the copy of o_proj
    before = loss(model)
    copied = copy.deepcopy(model)
    layers(copied)[0].base_layer.weight_fake_quantizer.enabled = False
    assert not torch.equal(loss(copied), before)
    # The merged layers are prepared ones still.
    assert torch.equal(loss(model.merge_and_unload()), before)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_fused_layers_share_the_global_scale_of_their_merged_weights(prepared: bool):
    base = prepared_llama("nvfp4") if prepared else tiny_llama()
    targets = ["q_proj", "k_proj", "gate_proj"]
    config = qat_lora_config(settings(target_modules=targets), None if prepared else "nvfp4")
    model = get_peft_model(base, config)
    groups = share_global_scales(model)
    names = [{name.rpartition(".")[2] for name in group} for group in groups]
    joined = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] if prepared else [{"q_proj", "k_proj"}]
    assert all(each in names for each in joined)
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, 64)
    before = attention.q_proj(x)
    members = [attention.q_proj.served_weight(), attention.k_proj.served_weight()]
    members += [attention.v_proj.weight.detach()] if prepared else []
    encoded = Nvfp4Scheme().encode(members[0], global_scale=shared_global_scale(each.abs().amax() for each in members))
    assert torch.equal(before, torch.nn.functional.linear(x, Nvfp4Scheme().decode(encoded, torch.float32)))
    torch.nn.init.constant_(attention.k_proj.lora_B["default"].weight, 3.0)
    after = attention.q_proj(x)
    assert not torch.equal(after, before)
    if prepared:
        merged = model.merge_and_unload()
        assert torch.equal(merged.model.layers[0].self_attn.q_proj(x), after)


def test_layers_that_nothing_quantizes_are_named():
    names = unseen_linears(adapted())
    assert {name.rpartition(".")[2] for name in names} == {"k_proj", "o_proj", "up_proj"}
    assert any(name.endswith("lm_head") for name in unseen_linears(adapted(), exclude=()))


REFUSED = {
    "lora_dropout": {"lora_dropout": 0.1},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "modules_to_save: 'k_proj'": {"modules_to_save": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_served_is_refused(message: str):
    with pytest.raises(ValueError, match=message):
        qat_lora_config(settings(**REFUSED[message]), "int4-g32")


def test_variants_by_another_way_are_refused_too():
    model = adapted()
    with pytest.raises(ValueError, match="'second' with dropout, a bias, or a variant"):
        model.add_adapter("second", settings(lora_dropout=0.1))


def test_several_active_adapters_are_refused():
    model = adapted()
    model.add_adapter("second", settings())
    loss(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active adapters default, second; want one"):
        loss(model)
    model.set_adapter("second")
    loss(model)
    with pytest.raises(ValueError, match="leave adapter_names"):
        model.eval()(input_ids=TOKENS, adapter_names=["default", "second"])


def test_targets_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match="target module that is a Embedding"):
        get_peft_model(tiny_llama(), qat_lora_config(settings(target_modules=["embed_tokens"]), "int4-g32"))
    with pytest.raises(ValueError, match=r"int4-g128 cannot take: .*choose a smaller group"):
        get_peft_model(tiny_llama(), qat_lora_config(settings(), "int4-g128"))
    with pytest.raises(ValueError, match="not prepared for QAT"):
        get_peft_model(tiny_llama(), qat_lora_config(settings()))
    with pytest.raises(ValueError, match="scheme='int4-g32' for a layer that is prepared"):
        get_peft_model(prepared_llama("int4-g32"), qat_lora_config(settings(), "int4-g32"))
    learned = tiny_llama()
    in_groups = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    quantize_(learned, QATConfig(weight_config=in_groups))
    with pytest.raises(ValueError, match="whose range is learned"):
        get_peft_model(learned, qat_lora_config(settings()))
    with pytest.raises(ValueError, match="did you mean 'int4-g32'"):
        qat_lora_config(settings(), "int4g32")


def test_trained_biases_are_merged_like_the_base_models():
    model = adapted(bias="lora_only")
    for layer in layers(model):
        layer.base_layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    before = loss(model)
    before.backward()
    assert all(layer.base_layer.bias.grad is not None for layer in layers(model))
    model.merge_adapter()
    assert torch.equal(loss(model), before)


def test_broken_adapters_are_not_merged_safely():
    model = adapted()
    layers(model)[0].lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight is not finite"):
        model.merge_and_unload(safe_merge=True)


def test_the_registry_of_peft_is_where_it_was():
    """An underscore there: a release that drops it fails here first."""
    config = settings()
    assert config._custom_modules is None
    made = qat_lora_config(config, "int4-g32")
    assert list(made._custom_modules) == [torch.nn.Linear, torch.nn.Module]
    assert config._custom_modules is None


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    layer = layers(adapted("int4-g32-a8"))[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, want = compiled(x), layer(x)
    assert torch.equal(output, want)
    inputs = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for mine, theirs in zip(*(torch.autograd.grad(each.sum(), inputs) for each in (output, want)), strict=True):
        assert torch.equal(mine, theirs)
