"""One NVFP4 global scale per group of layers that a server joins: values in training are those of the file."""

import copy

import pytest
import torch
from torch import nn

from aotrain.formats import nvfp4_global_scale
from aotrain.ops.fake_quantize import fake_quantized_linear
from aotrain.qat.experts import prepare_moe_qat
from aotrain.qat.fake_quantizer import fake_quantizer_of
from aotrain.qat.fused_scales import share_global_scales
from aotrain.quantization.fused_groups import shared_global_scale
from aotrain.quantization.schemes import Nvfp4Scheme, TensorScheme, get_scheme
from aotrain.testing import assert_bitwise_equal
from tests.nn.experts import Experts


class Layer(nn.Linear):
    """As `prepare_qat` leaves a layer."""

    def __init__(self, size: int, scheme: TensorScheme, gain: float) -> None:
        super().__init__(64, size, bias=False)
        nn.init.normal_(self.weight, std=gain)
        self.weight_fake_quantizer = fake_quantizer_of(scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantized_linear(x, self.weight, None, None, self.weight_fake_quantizer.arithmetic(self.weight))


def block(scheme: str = "nvfp4") -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"q_proj": (64, 0.1), "k_proj": (32, 1.0), "v_proj": (32, 0.3), "o_proj": (64, 0.2)}
    return nn.ModuleDict({name: Layer(n, get_scheme(scheme).weight, gain) for name, (n, gain) in sizes.items()})


GROUP = ("q_proj", "k_proj", "v_proj")


def test_members_are_encoded_with_the_scale_of_the_group():
    model = block()
    x = torch.randn(5, 64)
    before = {name: layer(x) for name, layer in model.items()}
    assert share_global_scales(model) == [GROUP, ("o_proj",)]
    scale = shared_global_scale(model[name].weight.abs().amax() for name in GROUP)
    for name in GROUP:
        encoded = Nvfp4Scheme().encode(model[name].weight, global_scale=scale)
        values = Nvfp4Scheme().decode(encoded, torch.float32)
        assert_bitwise_equal(model[name](x).detach(), torch.nn.functional.linear(x, values))
    assert not torch.equal(model["q_proj"](x), before["q_proj"])
    # That of its largest member, up to the bit that storing the reciprocal may cost.
    largest = nvfp4_global_scale(model["k_proj"].weight.detach().abs().amax())
    assert (scale.view(torch.int32) - largest.view(torch.int32)).abs().item() <= 1


def test_the_scale_follows_every_member():
    model = block()
    share_global_scales(model)
    x = torch.randn(5, 64)
    before = model["q_proj"](x)
    with torch.no_grad():
        model["k_proj"].weight[0, 0] = 50.0
    assert not torch.equal(model["q_proj"](x), before)


def test_gradients_pass_straight():
    model = block()
    share_global_scales(model)
    x, layer = torch.randn(5, 64), model["q_proj"]
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert torch.equal(grad, torch.ones(5, 64).t() @ x)
    assert model["k_proj"].weight.grad is None


def test_copies_share_among_themselves():
    model = block()
    share_global_scales(model)
    copied, x = copy.deepcopy(model), torch.randn(5, 64)
    before = model["q_proj"](x)
    with torch.no_grad():
        copied["k_proj"].weight[0, 0] = 50.0
    assert torch.equal(model["q_proj"](x), before)
    assert not torch.equal(copied["q_proj"](x), before)
    assert str(model["q_proj"].weight_fake_quantizer.scheme) == "FusedNvfp4Scheme(of 3 layers)"


def test_compiled_is_eager():
    torch.compiler.reset()
    model, x = block(), torch.randn(5, 64)
    share_global_scales(model)
    compiled = torch.compile(model["q_proj"], backend="aot_eager")
    assert_bitwise_equal(compiled(x).detach(), model["q_proj"](x).detach())


def test_other_schemes_have_no_global_scale():
    with pytest.raises(ValueError, match="without NVFP4 weights"):
        share_global_scales(block("int4-g32"))
    experts = Experts(dim=64, hidden=64)
    prepare_moe_qat(experts, "nvfp4")
    with pytest.raises(ValueError, match="without NVFP4 weights"):
        share_global_scales(experts)
