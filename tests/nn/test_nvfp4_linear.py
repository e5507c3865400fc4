"""NVFP4Linear: the parameters and state_dict of nn.Linear, configuration, compilation, checkpointing, training."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aotrain.formats import hadamard_signs
from aotrain.nn import NVFP4Linear, NVFP4TrainingConfig, save_products
from aotrain.ops import Nvfp4Recipe, nvfp4_linear
from aotrain.testing import assert_bitwise_equal

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def model(config: NVFP4TrainingConfig | None = None) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, 80), torch.nn.GELU(), torch.nn.Linear(80, 33, bias=False)]
    return torch.nn.Sequential(
        *(NVFP4Linear.from_float(layer, config) if isinstance(layer, torch.nn.Linear) else layer for layer in layers)
    )


def grads_of(module: torch.nn.Module, run, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    run(x).square().sum().backward()
    return [param.grad for param in module.parameters()]


def test_from_float_shares_parameters_hooks_and_names() -> None:
    linear = torch.nn.Linear(48, 33)
    calls = []
    linear.register_forward_hook(lambda *args: calls.append(1))
    linear.eval()
    for convert in (NVFP4Linear.from_float, NVFP4Linear.from_linear):
        layer = convert(linear)
        assert type(layer) is NVFP4Linear
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not layer.training
        layer(torch.randn(5, 48))
    assert len(calls) == 2
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not list(layer.buffers())
    plain = torch.nn.Linear(48, 33)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict(), strict=True)


def test_constructor_takes_the_arguments_of_its_peers() -> None:
    layer = NVFP4Linear(48, 32)
    assert layer.bias is None
    assert layer.rht_sign_vector == tuple(hadamard_signs(0).tolist())
    layer = NVFP4Linear(48, 32, True, device="meta", dtype=torch.bfloat16, rht_sign_vector=SIGNS)
    assert layer.bias.is_meta
    assert layer.weight.dtype == torch.bfloat16
    assert layer.rht_sign_vector == layer.config.rht_sign_vector == SIGNS
    with torch.device("meta"):
        assert NVFP4Linear(16, 16).weight.is_meta


def test_forward_is_the_operation_with_its_configuration() -> None:
    recipe = Nvfp4Recipe(square_weight_blocks=False)
    config = NVFP4TrainingConfig(seed=5, recipe=recipe, save_for_backward="quantized")
    layer, x = NVFP4Linear(48, 32, True, config=config), torch.randn(3, 7, 48)
    signs = tuple(int(sign) for sign in hadamard_signs(5).tolist())
    weight = layer.weight.detach().clone().requires_grad_()
    want = nvfp4_linear(x, weight, layer.bias.detach(), recipe=recipe, signs=signs, seed=5)
    got = layer(x)
    assert_bitwise_equal(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    assert_bitwise_equal(layer.weight.grad, weight.grad)
    assert "nvfp4, square_weight_blocks=False" in repr(layer)


def test_copies_and_pickles_keep_their_configuration(tmp_path) -> None:
    config = NVFP4TrainingConfig(seed=3, recipe=Nvfp4Recipe(hadamard=False))
    layer, x = NVFP4Linear(48, 32, config=config), torch.randn(5, 48)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert other.config == config
        assert_bitwise_equal(other(x), layer(x))


@pytest.mark.parametrize("context", [{}, {"context_fn": save_products()}], ids=["all", "selective"])
def test_checkpointed_and_compiled_blocks_give_the_same_bits(context) -> None:
    net, x = model(), torch.randn(37, 48)
    want = grads_of(net, net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for run in (lambda x: checkpoint(net, x, use_reentrant=False, **context), compiled):
        for got, expected in zip(grads_of(net, run, x), want, strict=True):
            assert_bitwise_equal(got, expected)


def test_selective_checkpointing_keeps_products() -> None:
    net, x = model(), torch.randn(37, 48, requires_grad=True)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.append(func) if func is torch.ops.aotrain.nvfp4_mm.default else None
            return func(*args, **(kwargs or {}))

    for context, want in (({}, 8), ({"context_fn": save_products()}, 6)):
        products.clear()
        with Count():
            checkpoint(net, x, use_reentrant=False, **context).square().sum().backward()
        assert len(products) == want


def test_learns_as_well_as_high_precision() -> None:
    """A teacher of the same shape: final losses within a few percent of the initial one."""

    def train(low_precision: bool) -> list[float]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        if low_precision:
            net[0], net[2] = NVFP4Linear.from_float(net[0]), NVFP4Linear.from_float(net[2])
        teacher = torch.randn(64, 64) / 8
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        losses = []
        for _ in range(150):
            x = torch.randn(128, 64)
            loss = (net(x) - x @ teacher).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain, nvfp4 = train(False), train(True)
    assert sum(nvfp4[-10:]) / 10 < sum(plain[-10:]) / 10 + 0.06 * plain[0]
    assert nvfp4[-1] < 0.2 * nvfp4[0]


def test_configuration_is_checked() -> None:
    assert NVFP4TrainingConfig() == NVFP4TrainingConfig(seed=0)
    assert hash(NVFP4TrainingConfig(rht_sign_vector=SIGNS)) != hash(NVFP4TrainingConfig())
    for signs in ((1, -1), (0,) * 16):
        with pytest.raises(ValueError, match="want 16 of 1 and -1"):
            NVFP4TrainingConfig(rht_sign_vector=signs)
    with pytest.raises(ValueError, match="save_for_backward"):
        NVFP4TrainingConfig(save_for_backward="fp4")


def test_a_split_weight_is_refused() -> None:
    layer = NVFP4Linear(16, 16)
    layer.weight.device_mesh = object()
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        layer(torch.randn(2, 16))
