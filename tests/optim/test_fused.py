"""Whole optimizers with the CPU kernel and without it: the same bits."""

import copy

import pytest
import torch

from aotrain import optim
from aotrain.kernels import _adam_cpu
from aotrain.testing import assert_bitwise_equal

CLASSES = [
    *(optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8, optim.AdamW32bit),
    *(optim.Adam8bit, optim.Adam4bit, optim.AdamFp8),
]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if _adam_cpu.library()[0] is None:
        pytest.skip(str(_adam_cpu.library()[1]))


def model(dtype: torch.dtype) -> torch.nn.Module:
    layers = torch.nn.Sequential(
        torch.nn.Embedding(50, 96), torch.nn.Linear(96, 80, bias=True), torch.nn.LayerNorm(80), torch.nn.Linear(80, 77)
    )
    return layers.to(dtype)


def train(optimizer: torch.optim.Optimizer, network: torch.nn.Module, *, reference: bool, steps: int = 4) -> list[int]:
    """Number of parameters that the reference stepped, for each step."""
    counts: list[int] = []
    step_reference, step_fused = optimizer._step_reference, optimizer._step_fused

    def counted(step: object) -> None:
        counts[-1] += 1
        step_reference(step)

    optimizer._step_reference = counted
    optimizer._step_fused = (lambda steps: steps) if reference else step_fused
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        counts.append(0)
        for param in network.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bf16_stochastic_round": True}, {"maximize": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("kind", CLASSES)
def test_equals_the_reference(kind: type[torch.optim.Optimizer], options: dict[str, object], dtype: torch.dtype):
    fused = model(dtype)
    plain = copy.deepcopy(fused)
    optimizers = [kind(network.parameters(), lr=1e-2, **options) for network in (fused, plain)]
    assert train(optimizers[0], fused, reference=False) == [0] * 4
    assert train(optimizers[1], plain, reference=True) == [7] * 4
    for (name, got), want in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_bitwise_equal(got.detach(), want.detach(), what=name)
        for key, value in optimizers[1].state[want].items():
            assert_bitwise_equal(optimizers[0].state[got][key], value, what=f"{name}.{key}")


def test_groups_with_options_of_their_own_and_amsgrad():
    fused = model(torch.bfloat16)
    plain = copy.deepcopy(fused)

    def make(network: torch.nn.Module) -> torch.optim.Optimizer:
        embedding, *others = network.parameters()
        groups = [
            {"params": [embedding], "bits": 32, "weight_decay": 0.0},
            {"params": others[:2], "bits": 4, "lr": 3e-3},
            {"params": others[2:5], "bf16_stochastic_round": True},
            {"params": others[5:], "amsgrad": True},
        ]
        return optim.AdamW8bit(groups, lr=torch.tensor(1e-2), seed=3)

    optimizers = [make(network) for network in (fused, plain)]
    # The kernel has no amsgrad: the reference steps that group.
    assert train(optimizers[0], fused, reference=False) == [1] * 4
    train(optimizers[1], plain, reference=True)
    for got, want in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_bitwise_equal(got.detach(), want.detach())


def test_a_step_bumps_the_version_of_its_parameters():
    network = model(torch.float32)
    versions = [param._version for param in network.parameters()]
    train(optim.AdamW8bit(network.parameters()), network, reference=False, steps=1)
    assert all(param._version > before for param, before in zip(network.parameters(), versions, strict=True))


@pytest.mark.parametrize("change", ["moved", "loaded", "grad dtype", "grad layout", "bits"])
def test_what_was_prepared_is_prepared_anew_after_a_change(change: str):
    fused = model(torch.bfloat16)
    plain = copy.deepcopy(fused)
    optimizers = [optim.AdamW8bit(network.parameters(), lr=1e-2) for network in (fused, plain)]
    train(optimizers[0], fused, reference=False, steps=2)
    train(optimizers[1], plain, reference=True, steps=2)
    for network, optimizer in zip((fused, plain), optimizers, strict=True):
        weight = network[1].weight
        if change == "moved":
            weight.data = weight.data.clone()
        elif change == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif change == "bits":
            state = optim.convert_state(optimizer.state_dict(), optimizer)
            optimizer.param_groups[0]["bits"] = 32
            optimizer.load_state_dict(optim.convert_state(state, optimizer))
        grads = [torch.ones(param.shape, dtype=param.dtype) for param in network.parameters()]
        if change == "grad dtype":
            weight.grad_dtype = None
            grads[1] = grads[1].float()
        elif change == "grad layout":
            grads[1] = grads[1].t().contiguous().t()
        for param, grad in zip(network.parameters(), grads, strict=True):
            param.grad = grad
        if network is plain:
            optimizer._step_fused = lambda steps: steps
        optimizer.step()
    for got, want in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_bitwise_equal(got.detach(), want.detach())
