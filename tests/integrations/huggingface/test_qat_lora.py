"""LoRA on a fake-quantized layer: the merged weight's grid, gradients of the adapters, and what is refused."""

import pytest
import torch

pytest.importorskip("peft", reason="needs the [hf] extra: pip install -e '.[hf]'")

from peft import LoraConfig, get_peft_model

from aotrain.integrations.huggingface.qat_lora import QATLoraLinear, quantize_what_is_served
from aotrain.quantization import get_scheme
from aotrain.testing import assert_bitwise_equal
from tests.integrations.huggingface import stand_in
from tests.integrations.huggingface.tiny import VOCABULARY, tiny_llama

TARGETS = ["q_proj", "down_proj"]


def adapted(dtype=torch.float32, scheme: str = "int4-g32"):
    model = tiny_llama().to(dtype)
    stand_in.prepare_qat(model, scheme)
    model = get_peft_model(model, quantize_what_is_served(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def tokens():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-a8"])
def test_training_sees_the_bits_of_the_merged_model(dtype, scheme):
    model = adapted(dtype, scheme)
    assert sum(isinstance(module, QATLoraLinear) for module in model.modules()) == 2
    seen = model(tokens()).logits
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    assert_bitwise_equal(seen, merged(tokens()).logits)


def test_switched_off_it_is_the_dense_merged_model():
    model = adapted()
    stand_in.QATSchedule(start_step=1).apply(model, 0)
    seen = model(tokens()).logits
    merged = model.merge_and_unload()
    assert_bitwise_equal(seen, merged(tokens()).logits)


def test_without_its_adapter_it_is_the_quantized_base():
    base = tiny_llama()
    stand_in.prepare_qat(base, "int4-g32")
    model = adapted()
    with model.disable_adapter():
        assert_bitwise_equal(model(tokens()).logits, base(tokens()).logits)


def test_gradients_are_those_of_the_merged_weight_straight_through():
    model = adapted()
    layer = next(module for module in model.modules() if isinstance(module, QATLoraLinear))
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    probe = torch.randn(2, 3, layer.out_features)
    (layer(x) * probe).sum().backward()
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    got = [x.grad, a.grad, b.grad]
    weight = layer.base_layer.weight.detach()
    x2, a2, b2 = (tensor.detach().double().requires_grad_() for tensor in (x, a, b))
    merged = weight + layer.scaling["default"] * (b2 @ a2)
    values = get_scheme("int4-g32").weight.values(layer.base_layer.weight + layer.get_delta_weight("default"))
    straight_through = merged + (values.double() - merged).detach()
    (torch.nn.functional.linear(x2, straight_through) * probe).sum().backward()
    for name, ours, want in zip("xab", got, [x2.grad, a2.grad, b2.grad], strict=True):
        error = (ours.double() - want).norm() / want.norm()
        assert error < 4 * torch.finfo(torch.float32).eps, name
    assert layer.base_layer.weight.grad is None


def test_under_autocast_the_grid_stays_that_of_the_merged_model():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        seen = model(tokens()).logits
    merged = model.merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(seen, merged(tokens()).logits)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_what_the_served_weight_cannot_express_is_refused(option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"QAT with LoRA got {name}=.*leave {name} out"):
        quantize_what_is_served(LoraConfig(target_modules=TARGETS, **option))


def test_a_second_adapter_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="second adapter 'more' beside 'default'"):
        model.add_adapter("more", quantize_what_is_served(LoraConfig(r=4, target_modules=TARGETS)))
