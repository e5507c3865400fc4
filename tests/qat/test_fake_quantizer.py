"""Fake quantizers: values of torchao's, straight-through gradients in every format, switches, kept scales."""

import copy

import pytest
import torch

from aotrain.qat import (
    FakeQuantizerBase,
    Float8FakeQuantizeConfig,
    Float8FakeQuantizer,
    Int4WeightFakeQuantizeConfig,
    Int4WeightFakeQuantizer,
    IntxFakeQuantizeConfig,
    IntxFakeQuantizer,
    MXFakeQuantizeConfig,
    NVFP4FakeQuantizeConfig,
    SchemeFakeQuantizeConfig,
)
from aotrain.quantization import SCHEMES, PerTensor
from tests.qat.models import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = (
    IntxFakeQuantizeConfig(torch.int4, group_size=32),
    IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
    Float8FakeQuantizeConfig(),
    Float8FakeQuantizeConfig(granularity=PerTensor()),
    Int4WeightFakeQuantizeConfig(32),
    Int4WeightFakeQuantizeConfig(32, torch.bfloat16),
    MXFakeQuantizeConfig(),
    NVFP4FakeQuantizeConfig(),
    SchemeFakeQuantizeConfig(SCHEMES["q4_0"].weight),
)


@pytest.mark.parametrize("precision", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_bit_for_bit_those_of_torchao(dtype: torch.dtype, precision: torch.dtype | None):
    peer = pytest.importorskip(
        "torchao.quantization.qat", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    x = randn(16, 64, dtype=dtype)
    grad = randn(16, 64, seed=1, dtype=dtype)
    cases = [
        {"dtype": getattr(torch, f"int{bits}"), **granularity}
        for bits in (2, 3, 4, 8)
        for granularity in ({"granularity": "per_channel"}, {"group_size": 32})
    ]
    for case in (*cases, {"dtype": torch.int8, "granularity": "per_token", "is_symmetric": False}):
        mine, theirs = (
            module(config(**case, scale_precision=precision))
            for module, config in (
                (IntxFakeQuantizer, IntxFakeQuantizeConfig),
                (peer.IntxFakeQuantizer, peer.IntxFakeQuantizeConfig),
            )
        )
        results = []
        for quantizer in (mine, theirs):
            leaf = x.clone().requires_grad_()
            values = quantizer(leaf)
            results.append((values, *torch.autograd.grad(values, leaf, grad)))
        (values, got), (theirs_values, want) = results
        assert torch.equal(values, theirs_values), case
        # Theirs is multiplied by the scale and by its reciprocal.
        assert torch.equal(got == 0, want == 0), case
        assert torch.allclose(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0), case


def test_value_zero_points_are_bit_for_bit_those_of_torchao():
    peer = pytest.importorskip(
        "torchao.quantization.qat.linear", reason="needs the [oracles] extra: pip install -e '.[oracles]'"
    )
    from aotrain.qat.linear import Int4WeightOnlyQATLinear, Int8DynActInt4WeightQATLinear

    for mine, theirs, dtype in (
        (Int4WeightOnlyQATLinear, peer.Int4WeightOnlyQATLinear, torch.bfloat16),
        (Int8DynActInt4WeightQATLinear, peer.Int8DynActInt4WeightQATLinear, torch.float32),
    ):
        layers = [cls(256, 48, groupsize=32, precision=dtype) for cls in (mine, theirs)]
        layers[1].weight = layers[0].weight
        x = randn(5, 256, dtype=dtype)
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_kind_and_printed_form(config):
    quantizer = FakeQuantizerBase.from_config(config)
    kinds = {
        IntxFakeQuantizeConfig: IntxFakeQuantizer,
        Float8FakeQuantizeConfig: Float8FakeQuantizer,
        Int4WeightFakeQuantizeConfig: Int4WeightFakeQuantizer,
    }
    assert type(quantizer) is kinds.get(type(config), FakeQuantizerBase)
    assert repr(quantizer) == f"FakeQuantizer({config})"
    assert quantizer.config is config
    assert not quantizer.state_dict()
    with pytest.raises(ValueError, match="Unknown config type: 3"):
        FakeQuantizerBase.from_config(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiny_gradients_survive(config, dtype: torch.dtype):
    """Others pass them through an unscaled float8 cast: 99.6 % of a mean loss's gradients of weights were zero."""
    quantizer = FakeQuantizerBase.from_config(config)
    x = randn(32, 128, dtype=dtype).requires_grad_()
    grad = randn(32, 128, seed=1).mul(1e-4).to(dtype)
    values = quantizer(x)
    assert values.dtype == dtype
    (got,) = torch.autograd.grad(values, x, grad)
    passed = got == grad
    assert (passed | (got == 0)).all()
    assert passed.float().mean() > 0.95
    if isinstance(config, Float8FakeQuantizeConfig | MXFakeQuantizeConfig | NVFP4FakeQuantizeConfig):
        assert passed.all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_zero_rows_stay_zero(config):
    x = randn(32, 128)
    x[:3] = 0
    values = FakeQuantizerBase.from_config(config)(x)
    assert torch.equal(values[:3], x[:3])
    assert values.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_leading_dimensions_are_rows_of_one_matrix(config):
    quantizer = FakeQuantizerBase.from_config(config)
    x = randn(4, 8, 128)
    x[0] *= 100
    assert torch.equal(quantizer(x), quantizer(x.reshape(32, 128)).view(4, 8, 128))
    strided = x.transpose(0, 1)
    assert torch.equal(quantizer(strided), quantizer(strided.contiguous()))


def test_a_callable_outside_of_autograd():
    quantizer = FakeQuantizerBase.from_config(CONFIGS[0])
    with torch.no_grad():
        x = randn(8, 64).requires_grad_()
        assert not quantizer(x).requires_grad


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_switched_off_it_is_the_identity(config):
    quantizer = FakeQuantizerBase.from_config(config)
    x = randn(32, 128)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    assert not torch.equal(quantizer(x), x)


def test_mix_lies_between():
    quantizer = FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(torch.int4, group_size=32))
    x = randn(8, 64).requires_grad_()
    values = quantizer(x)
    grad = randn(8, 64, seed=1)
    (full,) = torch.autograd.grad(values, x, grad)
    quantizer.mix = 0.25
    mixed = quantizer(x)
    assert torch.equal(mixed, torch.lerp(x, values, 0.25))
    (got,) = torch.autograd.grad(mixed, x, grad)
    assert torch.equal(got, torch.lerp(grad, full, 0.25))
    assert ((got == grad) | (full == 0)).all()
    assert (got != grad).any()


def test_scales_of_the_first_tensor_are_kept():
    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False))
    assert quantizer.scale is None
    x = randn(8, 64).requires_grad_()
    first = quantizer(x)
    scale = quantizer.scale
    assert scale.shape == (8, 2)
    assert not quantizer.state_dict()
    doubled = (2 * x.detach()).requires_grad_()
    values = quantizer(doubled)
    assert quantizer.scale is scale
    assert values.abs().max() == 8 * scale.max()
    assert first.abs().max() <= 8 * scale.max()
    (grad,) = torch.autograd.grad(values.sum(), doubled)
    # Codes are -8..7: what lies half a step beyond has none.
    steps = (doubled.detach().view(8, 2, 32) / scale[..., None]).view(8, 64)
    inside = (steps.round() >= -8) & (steps.round() <= 7)
    assert torch.equal(grad, inside.float())
    assert 0 < inside.sum() < inside.numel()
    assert copy.deepcopy(quantizer).to(torch.bfloat16).scale.dtype == torch.bfloat16
